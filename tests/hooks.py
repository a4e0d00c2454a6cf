"""What a process in the background changes in a command before it begins."""

import os
import time

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


def draw_without_end():
    sample.generate = lambda *_, **__: time.sleep(600)
