import pytest
import torch
from torch.nn import functional as F

from lightning_clamp.clamping.perturbation import available_sizes, make_grid, project


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_image_is_the_bicubic_upsampling_of_its_coefficients(size):
    grid = make_grid(size, (3, 16, 12))
    coefficients = torch.randn(grid.n_coefficients, dtype=torch.float64)
    expected = F.interpolate(coefficients.reshape(1, 3, size, size), size=(16, 12), mode="bicubic")[0]
    torch.testing.assert_close(grid.image(coefficients), expected)


@pytest.mark.parametrize("shape", [(3, 16, 12), (4, 9), (7,), (), (2, 3, 4, 5)])
def test_size_1_is_one_number_per_channel_of_any_input(shape):
    grid = make_grid(1, shape)
    image = grid.image(torch.arange(1.0, grid.n_coefficients + 1))
    assert image.shape == shape
    assert grid.n_coefficients == (shape[0] if shape else 1)
    assert torch.equal(image.reshape(grid.channels, -1).std(1, correction=0), torch.zeros(grid.channels))


@pytest.mark.parametrize(("size", "shape"), [(1, (2, 5, 6)), (2, (2, 5, 6)), (4, (1, 8, 8)), (1, (6,))])
def test_projection_is_the_adjoint_of_the_image(size, shape):
    grid = make_grid(size, shape)
    coefficients = torch.randn(grid.n_coefficients, dtype=torch.float64)
    gradient = torch.randn(5, *shape, dtype=torch.float64)
    inner = (gradient * grid.image(coefficients)).flatten(1).sum(1)
    torch.testing.assert_close(project(gradient, [grid])[0] @ coefficients, inner)


def test_several_grids_are_projected_on_together_and_axes_between_are_summed():
    grids = [make_grid(size, (2, 6, 5)) for size in (2, 1, 4)]
    gradient = torch.randn(5, 3, 2, 6, 5)
    alone = [project(gradient.double().sum(1), [grid])[0] for grid in grids]
    torch.testing.assert_close(project(gradient, grids), alone)
    (sums,) = project(torch.ones(5, 3, 7), [make_grid(1, (7,))])
    assert torch.equal(sums, 3 * torch.ones(5, 7, dtype=torch.float64))


def test_a_grid_as_large_as_the_image_spans_every_image():
    grid = make_grid(8, (1, 8, 8))
    assert torch.linalg.matrix_rank(torch.stack([grid.image(one).flatten() for one in torch.eye(64)])) == 64


def test_grids_larger_than_the_image_or_of_non_images_do_not_exist():
    assert available_sizes([1, 2, 4, 8], (3, 4, 6)) == [1, 2, 4]
    assert available_sizes([1, 2], (5, 20)) == [1]
    assert available_sizes([0, 1], (3, 4, 4)) == [1]
    with pytest.raises(ValueError, match="no grid of size 8"):
        make_grid(8, (3, 4, 4))
