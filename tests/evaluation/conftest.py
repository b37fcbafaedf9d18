"""Files of weights that several tests share."""

import pytest

from tests.evaluation import networks


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file with drawn weights of FID's Inception."""
    pytest.importorskip("torch_fidelity", reason="needs the extra `eval`")
    return networks.inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A name of timm, and a file with drawn weights of that network."""
    pytest.importorskip("timm", reason="needs the extra `eval`")
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return "test_efficientnet", networks.of_timm(path, "test_efficientnet")
