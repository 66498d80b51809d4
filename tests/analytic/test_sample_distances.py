"""Kernel, neighbour and transport distances against direct formulas and known values."""

import pytest
import torch
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import polynomial_kernel

from samplers.evaluation import (
    energy_distance,
    gaussian_kernel_distance,
    kernel_distance,
    kernel_distance_subsets,
    prdc,
    precision_recall,
    sliced_wasserstein,
)


def cloud(n, d=6, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kernel_distance_is_the_u_statistic():
    x, y = cloud(50), cloud(40, seed=1, shift=0.3)
    xx, yy, xy = (
        torch.from_numpy(polynomial_kernel(a, b, degree=3, gamma=1 / 6, coef0=1)) for a, b in [(x, x), (y, y), (x, y)]
    )
    expected = (xx.sum() - xx.trace()) / (50 * 49) + (yy.sum() - yy.trace()) / (40 * 39) - 2 * xy.mean()
    for block in (7, 64):
        assert kernel_distance(x, y, block=block) == pytest.approx(expected.item(), rel=1e-11)


def test_kernel_distance_is_unbiased():
    """Same law: the mean over repetitions is zero within its error; the V-statistic's would be far above."""
    values = torch.tensor([kernel_distance(cloud(30, seed=2 * i), cloud(30, seed=2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20


def test_subsets_agree_and_repeat():
    x, y = cloud(400), cloud(400, seed=1, shift=0.3)
    runs = [
        kernel_distance_subsets(x, y, subsets=50, subset_size=100, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    mean, std = runs[0]
    assert abs(mean - kernel_distance(x, y)) < 4 * std / 50**0.5 + 0.05 * mean
    with pytest.raises(ValueError, match="401"):
        kernel_distance_subsets(x, y, subset_size=401, generator=torch.Generator())


def test_gaussian_kernel_keeps_the_diagonal():
    x, y = cloud(20), cloud(30, seed=1, shift=1)
    k = [torch.exp(-torch.cdist(a, b).square() / 200) for a, b in [(x, x), (y, y), (x, y)]]
    expected = 1000 * (k[0].mean() + k[1].mean() - 2 * k[2].mean()).item()
    assert gaussian_kernel_distance(x, y, block=8) == pytest.approx(expected, rel=1e-9)
    assert gaussian_kernel_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_are_not_swapped():
    """Generated images of one mode out of two: all look real, half of the variety is missing."""
    real = torch.cat([cloud(200, seed=0), cloud(200, seed=1, shift=50)])
    result = precision_recall(cloud(200, seed=2), real)
    assert result.precision > 0.7
    assert 0.3 < result.recall < 0.5
    swapped = precision_recall(real, cloud(200, seed=2))
    assert (swapped.precision, swapped.recall) == (result.recall, result.precision)


@pytest.mark.parametrize("block", [16, 1024])
def test_prdc_by_brute_force(block):
    fake, real, k = cloud(60, 3, seed=4, shift=0.7), cloud(50, 3, seed=5), 4
    radius = [sorted((a - b).norm().item() for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    fake_radius = [sorted((a - b).norm().item() for j, b in enumerate(fake) if j != i)[k - 1] for i, a in enumerate(fake)]
    d = [[(r - f).norm().item() for f in fake] for r in real]
    inside = [[d[i][j] <= radius[i] for j in range(60)] for i in range(50)]
    expected = (
        sum(any(row[j] for row in inside) for j in range(60)) / 60,
        sum(any(d[i][j] <= fake_radius[j] for j in range(60)) for i in range(50)) / 50,
        sum(map(sum, inside)) / (k * 60),
        sum(any(row) for row in inside) / 50,
    )
    assert prdc(fake, real, k=k, block=block) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="from 1 to 49"):
        prdc(fake, real, k=50)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45), (7, 64)])
def test_one_dimensional_transport_is_exact(n, m):
    """In one dimension every direction is +1 or -1; W2 from the coupling of both quantile functions, with a fine grid."""
    x, y = cloud(n, 1, seed=1), 2 * cloud(m, 1, seed=2) + 1
    u = (torch.arange(n * m * 2, dtype=torch.float64) + 0.5) / (n * m * 2)
    a, b = x.flatten().sort().values[(u * n).long()], y.flatten().sort().values[(u * m).long()]
    expected = (a - b).square().mean().sqrt().item()
    value = sliced_wasserstein(x, y, projections=5, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(expected, rel=1e-12)
    assert wasserstein_distance(x.flatten(), y.flatten()) <= value + 1e-12


def test_shifted_clouds():
    """W2 between a cloud and its shift is |shift| in 1-D and |shift| sqrt(1/D) on average over directions."""
    x, shift = cloud(100, 4), torch.tensor([3.0, 0, 4.0, 0], dtype=torch.float64)
    value = sliced_wasserstein(x, x + shift, projections=4000, generator=torch.Generator().manual_seed(1))
    assert value == pytest.approx(5 / 2, rel=0.03)
    images = x.reshape(100, 1, 2, 2)
    assert sliced_wasserstein(images, images, generator=torch.Generator()) == 0


def test_energy_distance():
    """SciPy's is the square root of the V-statistic; here the diagonals are left out."""
    x, y = cloud(80, 1, seed=1), cloud(60, 1, seed=2, shift=1)
    within = torch.cdist(x, x).mean() / 79 + torch.cdist(y, y).mean() / 59
    expected = scipy_energy(x.flatten(), y.flatten()) ** 2 - within.item()
    assert energy_distance(x, y, block=17) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [kernel_distance, gaussian_kernel_distance, energy_distance, precision_recall])
def test_bad_input(distance):
    with pytest.raises(ValueError, match=r"\(n, D\)"):
        distance(cloud(5, 3), cloud(5, 4))
    broken = cloud(10)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        distance(broken, cloud(10))
