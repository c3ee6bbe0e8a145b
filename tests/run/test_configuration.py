"""What a run's checkpoints say of it is found once, however many are written."""

import torch
from checkpoints import tiny_llama

from fastheads.run import loop
from fastheads.run.api import profile
from fastheads.run.checkpoint import Checkpoint


def test_the_configuration_is_read_once_a_run(tmp_path, monkeypatch):
    digests, saved = [], []
    digest, save = loop.config_digest, Checkpoint.save

    def observed(model):
        digests.append(digest(model))
        return digests[-1]

    def kept(self, tensors, document):
        saved.append(document["configuration"])
        return save(self, tensors, document)

    monkeypatch.setattr(loop, "config_digest", observed)
    monkeypatch.setattr(Checkpoint, "save", kept)
    batches = [torch.randint(3, 100, (2, 5)) for _ in range(4)]
    profile(tiny_llama(), batches, checkpoint=tmp_path / "c", checkpoint_every=1e-9)
    assert len(saved) >= 4 and all(configuration == saved[0] for configuration in saved)
    assert saved[0]["model configuration"] == digests[0]
    assert len(digests) == 1
