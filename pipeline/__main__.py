"""The stages and commands of the pipeline: `python -m pipeline NAME ...`."""

import runpy
import sys

STAGES = ("prepare", "extract", "probe", "advise", "stage1", "stage2", "evaluate", "report")


def main() -> None:
    """Run the module that a name stands for."""
    name = sys.argv.pop(1)
    room = "" if name in STAGES else "launcher." if name == "join" else "commands."
    runpy.run_module(f"pipeline.{room}{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
