"""`training/train.py` on CPUs that Accelerate takes for accelerators, where alone it shards networks."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

initialize = PartialState.__init__


def pretend(state: PartialState, *args, **kwargs) -> None:
    initialize(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


if __name__ == "__main__":
    PartialState.__init__ = pretend
    sys.path.insert(0, "training")
    from train import main

    main()
