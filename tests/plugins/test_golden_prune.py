import numpy as np

from tests.plugins import golden


def test_the_reference_still_gives_the_golden_results():
    with np.load(golden.PATH) as file:
        stored = dict(file)
    found = golden.outputs(stored)
    assert found.keys() <= stored.keys()
    for name, value in found.items():
        assert value.dtype == stored[name].dtype
        np.testing.assert_allclose(value, stored[name], atol=1e-6, err_msg=name)
