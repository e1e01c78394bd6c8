"""timm's own legacy_xception and ours give the same logits."""

import importlib.util

import pytest
import torch
from fakes import import_timm

from edgexception.model.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def timm():
    if not (importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")):
        pytest.skip("timm or torchvision is not installed: `make setup` installs both")
    return import_timm()


def randomized(model):
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("top", [True, False])
def test_parity_with_timm(tmp_path, timm, top):
    model = timm.create_model("legacy_xception", num_classes=1000 if top else 0)
    model = randomized(model)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    loaded = load_checkpoint(tmp_path / "timm.pth")
    config = model.default_cfg
    assert loaded.preprocess.input_size == config["input_size"][1:]
    assert loaded.preprocess.interpolation == config["interpolation"]
    assert loaded.preprocess.crop_fraction == config["crop_pct"]
    assert loaded.preprocess.mean == tuple(255 * value for value in config["mean"])
    assert loaded.preprocess.std == tuple(255 * value for value in config["std"])
    if top:
        assert sum(p.numel() for p in loaded.network.parameters()) == 22_855_952
    for size in (299, 150, 128, 71) if top else (150,):
        x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
        with torch.no_grad():
            theirs, ours = model(x), loaded.network(x)
        assert theirs.abs().max() > 0.01
        difference = (theirs - ours).abs().max().item()
        print(f"timm {size} top={top}: {difference:.2e} of {theirs.abs().max():.3g}")
        assert difference <= 1e-4
