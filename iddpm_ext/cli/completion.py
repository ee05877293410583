"""Print a script that makes a shell complete verbs and flags.

Example: eval "$(iddpm completion bash)"
"""

from __future__ import annotations

from typing import Annotated, Literal

import tyro


def run(shell: Annotated[Literal["bash", "zsh", "tcsh"], tyro.conf.Positional] = "bash") -> None:
    """Prints the script: `eval "$(iddpm completion bash)"`.

    Args:
        shell: the shell that reads it.
    """
    from iddpm_ext.cli import print_completion

    print_completion(shell)
