"""FID's Inception by torch-fidelity, with weights drawn at random in the place of the released ones."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from iddpm_ext import evaluate
from iddpm_ext.evaluation.extractors import FidelityInception


def test_features_are_those_of_torch_fidelity(tmp_path):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    names = "inception-v3-compat", ["2048", "logits_unbiased"]
    torch.save({}, path)
    with mock.patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"):
        theirs = inception.FeatureExtractorInceptionV3(
            *names, feature_extractor_weights_path=str(path)
        ).eval()
    torch.save(theirs.state_dict(), path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    extractor = FidelityInception(path)
    found = extractor(images)
    with torch.no_grad():
        features, logits = theirs(images)
    assert torch.equal(found.features, features)
    assert torch.equal(found.probabilities, logits.softmax(1))
    assert found.spatial is not None and found.spatial.shape == (4, 7 * 17 * 17)
    x = images.float() / 127.5 - 1
    scores = evaluate(
        x, x.flip(0), extractor=extractor, metrics=("kid",), resamples=0, cache="", progress=False
    )
    assert scores.sample_count == 4 and scores.scores
