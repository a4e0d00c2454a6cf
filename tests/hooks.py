"""What a process in the background changes in sample.py before its command begins."""

import os
import time
from pathlib import Path

import sample

generate = sample.generate


def print_what_is_drawn():
    """Print the first index of each batch; later ranks start late."""
    load = sample.load_model

    def late(*arguments):
        time.sleep(float(os.environ["RANK"] != "0"))
        return load(*arguments)

    def printing(model, labels, indices, **how):
        print("drawn:", indices[0])
        return generate(model, labels, indices, **how)

    sample.load_model, sample.generate = late, printing


def wait_for_go():
    """Draw only when there is a file called `go`."""
    def patient(*arguments, **how):
        while not Path("go").exists():
            time.sleep(0.05)
        return generate(*arguments, **how)

    sample.generate = patient
