"""Which share of the shards is this process's? As torchrun, accelerate launch, MPI or Slurm say.

No process group is made: processes share a folder and nothing else, so none waits for another and none can hang.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from accelerate.utils import get_int_from_env

RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_ARRAY_TASK_ID")
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class Worker:
    """One of ``world`` processes.

    Attributes:
        rank: from 0.
        world: processes.
        local: rank on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Worker:
        """As the launcher says; one process without a launcher.

        Raises:
            ValueError: numbers that do not fit.
        """
        base = get_int_from_env(["SLURM_ARRAY_TASK_MIN"], 0) if "SLURM_ARRAY_TASK_ID" in os.environ else 0
        world = get_int_from_env(list(WORLD), 1)
        rank = get_int_from_env(list(RANK), 0) - base
        if not 0 <= rank < world:
            raise ValueError(f"the launcher says rank {rank} of {world} processes")
        return cls(rank, world, get_int_from_env(list(LOCAL), 0))

    def device(self, device: str) -> str:
        """``cuda`` with this process's number."""
        return f"cuda:{self.local}" if device == "cuda" and self.world > 1 else device

    def share(self, items: list[int]) -> list[int]:
        """This process's share of all items; every process must give the same list."""
        return items[self.rank :: self.world]
