"""Start several processes on one stage, by PyTorch's elastic launcher: what torchrun runs."""

import logging
import os
import sys
from collections.abc import Sequence

from pipeline.runtime import processes, threads

STARTED = "PIPELINE_LAUNCHED"  # in the environment of the processes started here


def launch(module: str, arguments: Sequence[str]) -> int:
    """Run a module in several processes of this machine; gives the exit code.

    One that dies ends the others: the stage goes on from what it saved when it is started again.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    n = processes()
    each = max(1, threads() // n)
    os.environ |= {STARTED: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(each))}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id="pipeline",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError:
        return 1  # who failed has said why
    except SignalException:
        return 1
    return 0
