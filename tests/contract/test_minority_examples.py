"""Kinds that a person points at: balanced training, features of patches, what is alike."""

import pytest
import torch

from samplers import NoiseSchedule
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    PatchFeatures,
    Whitening,
    alike,
    fit,
    label_mask,
    marked_kinds,
)
from samplers.guidance.fitting import _sampler
from samplers.reference import digit_images

NOISE = NoiseSchedule.vp_linear()


def test_balanced_batches_show_every_label_alike_and_only_training_rows(generator):
    labels = torch.tensor([0] * 90 + [2] * 8 + [5] * 2)
    train = torch.cat([torch.arange(0, 90, 2), torch.arange(90, 97), torch.tensor([99])])
    rows = _sampler(labels, train, True)(6000, generator())
    assert torch.isin(rows, train).all()
    shown = torch.bincount(labels[rows], minlength=6)[[0, 2, 5]] / 6000
    torch.testing.assert_close(shown, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    assert len(rows.unique()) == len(train)
    common = torch.bincount(rows, minlength=100)[train[:45]].double()  # alike within a label
    assert common.std() / common.mean() < 0.3


def test_a_balanced_classifier_learns_a_label_of_one_percent_and_keeps_the_probabilities_of_the_data():
    x = 0.2 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(2000) % 100 == 0).long()
    x[:, 0] += 0.5 * labels  # 2.5 standard deviations: they overlap
    classifier = MinorityClassifier((4,), 2, width=16, depth=1)
    settings = FitSettings(steps=250, batch_size=64, lr=5e-3, validation=0.0, check_every=250, balanced=True)
    fit(classifier, x, labels, NOISE, settings)
    log_prob = classifier.log_prob(0.9995**0.5 * x, 0.9995**0.5, 0.0005**0.5).detach()
    rank = log_prob[:, 1].argsort().argsort().double()
    assert 0.003 < log_prob[:, 1].exp().mean() < 0.03  # one half, were the loss not adjusted
    assert rank[labels == 1].mean() / 2000 > 0.9


def test_patches_tell_images_apart_by_shape_and_not_by_contrast():
    images, labels = (part[:600] for part in digit_images("train"))
    seen = PatchFeatures(images, size=3, words=40)
    features = seen(images)
    assert features.shape == (len(images), 40)
    assert features.min() >= 0
    torch.testing.assert_close(seen(images[:3]), features[:3])
    finer = PatchFeatures(images, size=3, words=40, places=2)
    assert torch.equal(finer.words, seen.words)
    torch.testing.assert_close(finer(images[:3]).unflatten(1, (40, 4)).mean(2), features[:3])  # 6 x 6 patches
    torch.testing.assert_close(seen(0.3 + 0.5 * images[:3]), features[:3], rtol=0, atol=0.4)
    white = Whitening.fit(finer(images), rank=20)(finer(images))
    ones = (labels == 1).nonzero().flatten()
    likeness = alike(white, ones[:10])
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[ones[:10]] = False
    first = likeness.masked_fill(~rest, -2).topk(20).indices
    assert (labels[first] == 1).double().mean() > 0.7  # a tenth by chance


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 9}, "size must lie in 2..8"), ({"size": 3, "places": 7}, "places must lie in 1..6"), ({"words": 1}, "words")],
)
def test_patches_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        PatchFeatures(digit_images("test")[0], **options)


def test_a_whitening_of_leading_directions():
    vectors = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.1, 2.0, 0.2])
    white = Whitening.fit(vectors, shrink=1e-9, rank=2)(vectors)
    torch.testing.assert_close(white.T.cov(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert abs(torch.corrcoef(torch.stack([white[:, -1], vectors[:, 0].double()]))[0, 1]) > 0.99
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.4"):
        Whitening.fit(vectors, rank=5)


def test_alike_is_the_cosine_with_the_mean_direction():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, -1.0]])
    torch.testing.assert_close(alike(features, [0, 1]), torch.tensor([0.5**0.5, 0.5**0.5, 1.0, -1.0]))
    with pytest.raises(ValueError, match="no sample 4"):
        alike(features, [0, 4])
    with pytest.raises(ValueError, match="at least one"):
        alike(features, [])


def test_marked_kinds_are_labels_of_a_split_rarest_bin():
    labels = marked_kinds(6, [[4, 1], torch.tensor([0])])
    assert labels.tolist() == [2, 1, 0, 0, 1, 0]
    classifier = MinorityClassifier((3,), 2, parts=2, width=4, depth=1)
    assert int(labels.max()) < classifier.labels
    assert label_mask(classifier, "part:1", 1).tolist() == [[False, False, True]]
    for kinds, message in (([], "no kinds"), ([[1], []], "kind 1 must name"), ([[1], [2, 1]], "sample 1 is in kind 0")):
        with pytest.raises(ValueError, match=message):
            marked_kinds(6, kinds)
    with pytest.raises(ValueError, match="every sample"):
        marked_kinds(2, [[0], [1]])
