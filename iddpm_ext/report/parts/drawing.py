"""The parts with images: samples, the chain as a film, nearest training images."""

from __future__ import annotations

import torch
from torch import Tensor

import iddpm_ext
from iddpm_ext.report import pictures
from iddpm_ext.report.elements import Body, Cell, Command, Element, Film, Picture, Table, Text
from iddpm_ext.report.parts.common import images_of, possible, usual_sampler
from iddpm_ext.report.subject import Subject

_CHAIN_IMAGES = 8
_NEAREST = 8
_NEIGHBOURS = 3
_FRAMES = 40
_COPIED = 0.5


def samples(subject: Subject) -> Body:
    """Images of every class at several numbers of steps."""
    subject.require_sampling()
    effort, names = subject.effort, subject.class_names
    shown = names[: effort.most_classes] if names else ["any"]
    each = effort.per_class if names else 2 * effort.per_class
    labels = [label for label in range(len(shown)) for _ in range(each)] if names else None
    steps = possible(subject, effort.sample_steps)
    columns = []
    for count in steps:
        x = iddpm_ext.sample(
            subject.model, count, n=each * len(shown), labels=labels, seed=subject.seed,
            sampler=usual_sampler(count),
        )  # fmt: skip
        columns.append(x.split(each))
    rows: list[tuple[Cell, ...]] = []
    for i, name in enumerate(shown):
        cells: list[Cell] = [name]
        for count, images in zip(steps, columns, strict=True):
            source, width = pictures.strip(images[i], columns=4)
            alt = f"{each} samples of class {name}" if names else f"{each} samples"
            cells.append(Picture(source, f"{alt}, drawn in {count} steps", width))
        rows.append(tuple(cells))
    head = ("class", *(f"{count} steps ({usual_sampler(count)})" for count in steps))
    elements: list[Element] = [
        Table(f"Samples, seed {subject.seed}; the same noise in every column.", head, tuple(rows))
    ]
    if names and len(shown) < len(names):
        elements.append(Text(f"The first {len(shown)} of {len(names)} classes."))
    wanted = f"--labels all -n {each * len(names)}" if names else f"-n {each}"
    elements += [
        Command(
            f"iddpm sample {subject.word} {wanted} --steps {count} --sampler "
            f"{usual_sampler(count)} --seed {subject.seed} --out samples-{count}.png"
        )
        for count in steps
    ]
    return Body(tuple(elements))


def chain(subject: Subject) -> Body:
    """How noise becomes images, as a film."""
    subject.require_sampling()
    names = subject.class_names
    labels = [i % len(names) for i in range(_CHAIN_IMAGES)] if names else None
    (count,) = possible(subject, (subject.effort.chain_steps,))
    every = -(-count // _FRAMES)
    frames = [
        step
        for step in iddpm_ext.sample_progressive(
            subject.model, count, n=_CHAIN_IMAGES, labels=labels, seed=subject.seed
        )
        if step.t % every == 0
    ]
    columns = _CHAIN_IMAGES // 2
    x, width, height = pictures.film([step.x for step in frames], columns)
    x_0, *_ = pictures.film([step.x_0 for step in frames], columns)
    trained = subject.model.diffusion.num_train_timesteps if subject.model.diffusion else 0
    shown = f" of {', '.join(names[:_CHAIN_IMAGES])}" if names else ""
    film = Film(
        sources=(x, x_0),
        names=("the image so far, x_t", "what the network sees in it, x_0"),
        width=width,
        height=height,
        captions=tuple(f"step {step.timestep} of {trained}" for step in frames),
        alt=f"{_CHAIN_IMAGES} images{shown} on their way from noise, and the network's guess of each",
    )
    labelled = f" --labels {','.join(map(str, labels))}" if labels else f" -n {_CHAIN_IMAGES}"
    command = (
        f"iddpm sample {subject.word}{labelled} --steps {count} --seed {subject.seed} "
        f"--out chain.png --animate chain.webp"
    )
    return Body((film, Command(command)))


def nearest(subject: Subject) -> Body:
    """Samples beside the training images that resemble them most."""
    subject.require_sampling()
    data = subject.open("train")
    known = images_of(data, subject.effort.nearest_of)
    names = subject.class_names
    labels = [i % len(names) for i in range(_NEAREST)] if names else None
    (count,) = possible(subject, (50,))
    x = iddpm_ext.sample(subject.model, count, n=_NEAREST, labels=labels, seed=subject.seed).cpu()
    found, places = _distances(x, known).topk(min(_NEIGHBOURS, len(known)), largest=False)
    # How far a training image is from the nearest other one says what "near" means here.
    among = _distances(known[:256], known)
    among.fill_diagonal_(torch.inf)
    usual = float(among.amin(1).median())
    rows: list[tuple[Cell, ...]] = []
    copied = 0
    for i in range(_NEAREST):
        of = f" of class {names[labels[i]]}" if names and labels else ""
        sample, width = pictures.strip(x[i : i + 1])
        neighbours, wide = pictures.strip(known[places[i]])
        ratio = float(found[i, 0]) / usual if usual else torch.inf
        copied += ratio < _COPIED
        rows.append(
            (
                names[labels[i]] if names and labels else f"sample {i + 1}",
                Picture(sample, f"a sample{of}", width),
                Picture(neighbours, f"the {found.shape[1]} training images nearest to it", wide),
                f"{ratio:.2f}",
            )
        )
    head = ("sample of", "sample", "nearest training images", "distance")
    caption = (
        f"By the distance of pixels, among {len(known):,} training images. A distance of 1 is the usual "
        "one from a training image to the nearest other one."
    )
    verdict = (
        f"{copied} of {_NEAREST} samples are closer than {_COPIED} to a training image: the model may "
        "be repeating what it saw. More data, or fewer training steps, help."
        if copied
        else f"No sample is closer than {_COPIED}: none is a copy of a training image."
    )
    facts = {"samples like copies": f"{copied} of {_NEAREST}"}
    return Body((Table(caption, head, tuple(rows)), Text(verdict)), facts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.flatten(1).float(), b.flatten(1).float())
