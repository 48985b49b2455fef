"""scvi-tools' SCVI under the patch, on real counts."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.integrations import patch_scvi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scvi = pytest.importorskip("scvi")
    anndata = pytest.importorskip("anndata")
    sparse = pytest.importorskip("scipy.sparse")

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = [("nb", "gene"), ("zinb", "gene"), ("poisson", "gene-cell"), ("nb", "gene-cell"), ("zinb", "gene-batch")]


@pytest.fixture(scope="module")
def cells():
    parts = np.load(Path(__file__).parents[1] / "data/pbmc68k_counts.npz")
    matrix = sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), parts["shape"]).astype(np.float32)
    data = anndata.AnnData(matrix[:256])
    data.obs["batch"] = np.arange(256) % 3
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    return data


def trained(cells, likelihood, dispersion, **options):
    scvi.settings.verbosity = 40
    scvi.settings.seed = 0
    model = scvi.model.SCVI(cells, gene_likelihood=likelihood, dispersion=dispersion, **options)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": None}
    model.train(max_epochs=4, batch_size=64, accelerator="cpu", train_size=0.8, check_val_every_n_epoch=1, **quiet)
    return model


def log_probs(monkeypatch):
    """How often fastvae computes the likelihood."""
    from fastvae.integrations import scvi as integration

    calls = []
    own = integration.count_nll
    monkeypatch.setattr(integration, "count_nll", lambda *args: calls.append(1) or own(*args))
    return calls


@pytest.mark.parametrize(("likelihood", "dispersion"), CASES)
def test_training(cells, likelihood, dispersion, monkeypatch, tmp_path):
    """The same curves, the same model to work with; fastvae computes the training steps and no others."""
    calls = log_probs(monkeypatch)
    own = trained(cells, likelihood, dispersion)
    assert not calls
    with patch_scvi():
        ours = trained(cells, likelihood, dispersion)
        assert len(calls) == 4 * 4
        n_calls = len(calls)
        latent = ours.get_latent_representation()
        expression = ours.get_normalized_expression(n_samples=2, transform_batch=1)
        assert len(calls) == n_calls
        ours.save(tmp_path / "model")
    for name in ("train_loss_epoch", "validation_loss", "elbo_train"):
        if name in own.history:
            np.testing.assert_allclose(
                ours.history[name].to_numpy(dtype=float), own.history[name].to_numpy(dtype=float), rtol=1e-4
            )
    np.testing.assert_allclose(latent, own.get_latent_representation(), atol=1e-2)
    assert expression.shape == (256, 765)
    loaded = scvi.model.SCVI.load(tmp_path / "model", adata=cells, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), latent)


@pytest.mark.parametrize(
    "options",
    [{"dispersion": "gene-label"}, {"likelihood": "normal"}, {"batch_representation": "embedding"}],
    ids=str,
)
def test_what_scvi_serves_itself(cells, options, monkeypatch):
    calls = log_probs(monkeypatch)
    arguments = {"likelihood": "nb", "dispersion": "gene", **options}
    own = trained(cells, **arguments)
    with patch_scvi():
        ours = trained(cells, **arguments)
    assert not calls
    assert ours.history["elbo_train"].equals(own.history["elbo_train"])


def test_undone(cells):
    own = scvi.module.VAE.generative
    patch = patch_scvi()
    assert scvi.module.VAE.generative is not own
    with pytest.raises(RuntimeError, match="in effect once"):
        patch_scvi()
    patch.undo()
    assert scvi.module.VAE.generative is own


def test_other_attributes_come_from_scvi(cells):
    model = scvi.model.SCVI(cells, gene_likelihood="nb")
    model.module.train()
    z, library, batch = torch.randn(4, 10), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64)
    with patch_scvi():
        outputs = model.module.generative(z, library, batch)
        assert outputs["px"].mean.shape == (4, 765)
        with torch.no_grad():
            assert isinstance(model.module.generative(z, library, batch)["px"], scvi.distributions.NegativeBinomial)
