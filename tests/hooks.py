"""What a process in the background changes in a command before it begins."""

import os
import time
from pathlib import Path

import sample
import train

generate = sample.generate


def print_what_is_drawn():
    """Print the first index of each batch; later ranks start late, and are slow."""
    load = sample.load_model

    def late(*arguments):
        time.sleep(float(os.environ["RANK"] != "0"))
        return load(*arguments)

    def printing(model, labels, indices, **how):
        print("drawn:", indices[0])
        time.sleep(0.5 * (os.environ["RANK"] != "0"))
        return generate(model, labels, indices, **how)

    sample.load_model, sample.generate = late, printing


def save_slowly():
    """A checkpoint takes two seconds."""
    save = train.save_checkpoint

    def slow(*arguments):
        time.sleep(2)
        save(*arguments)

    train.save_checkpoint = slow


def wait_for_go():
    """Draw only when there is a file called `go`."""
    def patient(*arguments, **how):
        while not Path("go").exists():
            time.sleep(0.05)
        return generate(*arguments, **how)

    sample.generate = patient
