"""State that outlives a batch: queue, bank, centres and ledger. Fixed-shape, persistent, in place."""

from lightning_nrml.memory.bank import FeatureBank
from lightning_nrml.memory.centers import CenterMemory
from lightning_nrml.memory.label_ledger import LabelLedger
from lightning_nrml.memory.ledger import SampleLedger
from lightning_nrml.memory.mining import MiningConfig
from lightning_nrml.memory.pool import CandidatePool
from lightning_nrml.memory.queue import FeatureQueue

__all__ = [
    "CandidatePool",
    "CenterMemory",
    "FeatureBank",
    "FeatureQueue",
    "LabelLedger",
    "MiningConfig",
    "SampleLedger",
]
