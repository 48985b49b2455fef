"""A third backend for tests of both others: the kernels as compiled for a GPU, executed as PTX on the CPU."""

from itertools import product

import pytest

from tests.helpers.executed import executed
from tests.kernels import test_philox
from tests.ops import test_elbo, test_latent_stats, test_loss_edges, test_loss_options, test_reparam_kl

pytestmark = pytest.mark.compiled

# of each test's parametrizations, one in so many. Not here: a sample's loss equals that of the sample alone to the bit
# in the interpreter; compiled, to the last bit only where rows are a multiple of 16 long, as layouts differ otherwise.
SUBSET = {
    test_reparam_kl.test_value_and_gradient_with_a_seed: 5,
    test_reparam_kl.test_clamped_logvar: 1,
    test_reparam_kl.test_clamp_passes_the_gradient_at_its_bounds_and_keeps_nan: 1,
    test_reparam_kl.test_kl_does_not_cancel_near_the_prior: 1,
    test_reparam_kl.test_finite_over_the_whole_clamp_range: 1,
    test_reparam_kl.test_an_int_and_a_tensor_seed_agree: 1,
    test_reparam_kl.test_offset_continues_the_stream: 1,
    test_reparam_kl.test_any_subset_of_inputs_and_outputs: 2,
    test_elbo.test_values_and_gradients: 9,
    test_elbo.test_upstream_gradients_of_the_loss: 3,
    test_elbo.test_one_pass_and_two_give_the_same_bits: 1,
    test_elbo.test_any_outputs: 3,
    test_elbo.test_any_inputs: 3,
    test_elbo.test_second_backward_of_a_retained_graph: 1,
    test_elbo.test_mixed_dtypes: 1,
    test_elbo.test_layouts: 2,
    test_elbo.test_more_dimensions_than_can_be_read_in_place: 1,
    test_elbo.test_nan_stays_in_its_sample: 1,
    test_loss_edges.test_log_cosh_is_finite_where_its_textbook_form_overflows: 1,
    test_loss_edges.test_bernoulli_on_extreme_logits: 1,
    test_loss_edges.test_bernoulli_of_certain_probabilities_is_as_torch: 1,
    test_loss_edges.test_bernoulli_of_probabilities_of_every_magnitude: 1,
    test_loss_edges.test_what_is_no_probability_has_no_likelihood: 2,
    test_loss_edges.test_gradient_is_zero_where_nothing_differs_and_nan_where_it_is_nan: 1,
    test_loss_edges.test_masked_elements_may_be_anything: 2,
    test_loss_edges.test_free_bits_at_equality_are_as_torchs_clamp: 1,
    test_loss_edges.test_kl_to_itself_is_zero_and_near_it_exact: 1,
    test_loss_options.test_value_and_gradients: 13,
    test_latent_stats.test_every_statistic_of_every_shape: 3,
    test_latent_stats.test_dimensions_come_in_their_own_order: 1,
    test_latent_stats.test_clamped_logvar_is_counted: 1,
    test_latent_stats.test_numbers_that_are_not_finite_are_counted_and_stay_in_their_dimension: 1,
    test_latent_stats.test_the_kl_does_not_cancel_near_the_prior: 1,
    test_philox.test_normals_of_a_counter: 1,
    test_philox.test_every_part_of_the_stream_is_the_same: 2,
}


def parametrizations(function):
    """Keyword arguments of every call that pytest would make."""
    axes = []
    for mark in function.pytestmark if hasattr(function, "pytestmark") else []:
        names, values = mark.args
        if isinstance(names, str):
            names, values = [names], [[value] for value in values]
        axes.append([dict(zip(names, value, strict=True)) for value in values])
    for choice in product(*axes):
        yield {name: value for part in choice for name, value in part.items()}


CALLS = [
    pytest.param(function, arguments, id=f"{function.__name__}-{'-'.join(map(str, arguments.values()))}")
    for function, every in SUBSET.items()
    for arguments in list(parametrizations(function))[::every]
]


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_of_the_backends(function, arguments):
    with executed("sm_90"):
        function("triton", **arguments)
