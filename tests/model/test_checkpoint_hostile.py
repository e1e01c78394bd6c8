"""No checkpoint does harm: each broken one is refused in a paragraph, whatever is wrong with it."""

import random
import time

import pytest
import torch
from checkpoints import NARROW, layout, random_network, timm_state, write_by_name, write_keras
from hostile import hostile_checkpoints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgexception.errors import BadArtifact, UsageError
from edgexception.model import hdf5_file
from edgexception.model.checkpoint import load_checkpoint


def assert_paragraph(message, path):
    """One paragraph of readable text that names the file."""
    assert path.name in message
    assert 20 < len(message) < 800, message
    assert all(char.isprintable() for char in message), message
    assert "Traceback" not in message


# What is wrong -> what the message must say.
REASONS = {
    "hdf5 soft link": "is a soft or external link",
    "hdf5 external link": "is a soft or external link",
    "hdf5 virtual dataset": "is a virtual dataset",
    "hdf5 external storage": "has external storage",
    "hdf5 chunked shape bomb": "is chunked or compressed",
    "hdf5 compressed": "is chunked or compressed",
    "hdf5 integers": "has the type int32",
    "hdf5 nan": "holds NaN or infinite values",
    "hdf5 negative variance": "is a variance and holds negative values",
    "hdf5 extra tensor": "the tensors 'model_weights/extra' belong to no layer",
    "zip slip": "'../../evil.py' would be unpacked outside",
    "zip encrypted": "is encrypted",
    "zip bomb": "claims to unpack from",
    "graph lambda": "layer 'block1_conv1_act' (Lambda)",
    "graph flatten": "ties the head to one input size",
    "graph trained at inference": "training=True",
    "zip pickle holds code": "would run code",
    "stream pickle is code": "would run code",
    "pickle without values": "values are missing",
    "pickle transposed": "tensor 'fc.weight' has shape",
    "safetensors own wide": "its metadata is invalid: architecture.stem.1",
    "text h5": "unknown (it starts with 3c 68 74 6d",
}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_hostile_checkpoint_is_refused(tmp_path, seed):
    names = set()
    for name, path in hostile_checkpoints(tmp_path, seed):
        started = time.monotonic()
        try:
            load_checkpoint(path)
        except (BadArtifact, UsageError) as error:
            message = str(error)
            assert_paragraph(message, path)
            assert REASONS.get(name, "") in message, name
        else:
            pytest.fail(f"'{name}' was accepted")
        assert time.monotonic() - started < 20, name
        names.add(name)
    assert len(names) >= 200
    assert names >= REASONS.keys()
    assert not (tmp_path / "PWNED").exists()


WRITERS = {
    "m.keras": lambda path, model, _: write_keras(path, model),
    "m.h5": lambda path, model, _: write_by_name(path, model),
    "m.pth": lambda path, _, state: torch.save(state, path),
    "m.pt": lambda path, _, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "m.safetensors": lambda path, _, state: save_file(state, path),
}


@pytest.mark.parametrize("name", WRITERS)
@given(seed=st.integers(0, 2**32), whole=st.booleans(), count=st.integers(1, 4))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_flipped_bytes_are_refused_or_do_no_harm(tmp_path, name, seed, whole, count):
    """Bytes flipped anywhere, or in the headers at the file's two ends."""
    path = tmp_path / name
    good = tmp_path / f"good-{name}"
    if not good.exists():
        network = random_network(NARROW)
        WRITERS[name](good, layout(network, nested=True), timm_state(network))
    data = bytearray(good.read_bytes())
    chance = random.Random(seed)
    for _ in range(count):
        if whole:
            at = chance.randrange(len(data))
        else:
            at = chance.choice((chance.randrange(2048), -1 - chance.randrange(2048)))
        data[at] = chance.randrange(256)
    path.write_bytes(data)
    try:
        loaded = load_checkpoint(path)
    except (BadArtifact, UsageError) as error:
        assert_paragraph(str(error), path)
    else:
        assert loaded.network.architecture.stem == NARROW.stem
        assert all(torch.isfinite(value).all() for value in loaded.network.state_dict().values())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "is still busy with its structure after 0.5 s"),
        ("import os; os.abort()", "breaks on it"),
        ("import os; os._exit(3)", "breaks on it"),
    ],
)
def test_a_file_that_hangs_or_crashes_hdf5_is_refused(tmp_path, monkeypatch, program, reason):
    """HDF5 2.0 does hang: 1 of 1,500 fuzzed files sent it into an endless loop."""
    scan = tmp_path / "scan.py"
    scan.write_text(program)
    monkeypatch.setattr(hdf5_file, "_SCAN", scan)
    monkeypatch.setattr(hdf5_file, "SCAN_SECONDS", 0.5)
    write_by_name(tmp_path / "m.h5", layout(random_network(NARROW)))
    with pytest.raises(BadArtifact, match=reason):
        load_checkpoint(tmp_path / "m.h5")
