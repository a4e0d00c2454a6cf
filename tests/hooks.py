"""What a process in the background changes in a command before it begins."""

import ctypes
import os
import shutil
import sys
import time
from pathlib import Path

import sample
import train

generate = sample.generate


def print_what_is_drawn():
    """Print the first index of each batch; later ranks are slow, and must not look for batches."""
    later = os.environ["RANK"] != "0"

    def printing(model, labels, indices, **how):
        print("drawn:", indices[0])
        time.sleep(0.5 * later)
        return generate(model, labels, indices, **how)

    sample.generate = printing
    if later:
        sample.begin_export = None


def save_slowly():
    """A checkpoint takes two seconds."""
    save = train.save_checkpoint

    def slow(*arguments):
        time.sleep(2)
        save(*arguments)

    train.save_checkpoint = slow


def draw_without_end():
    sample.generate = lambda *_, **__: time.sleep(600)


def step_without_end():
    def forever(*_):
        print("in the step", flush=True)
        time.sleep(600)

    train.training_step = forever


def close_the_terminal(terminal):
    """Whatever is printed raises: EIO of a closed terminal, or EPIPE of a pipe (`| tee log`)."""
    reader, writer = os.openpty() if terminal else os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    os.close(reader)


def without_a_compiler():
    import torch._inductor.config as config                  # takes seconds
    config.cpp.cxx, config.compile_threads = ("/nonexistent/g++",), 1


def spoil_noise(value, *spoilt, setattr=setattr, quick_pictures=False):
    """In these training examples, one value of the noise is not what it was; of pictures, there is
    a line in the log alone."""
    draw_noise = train.draw_noise

    def draw_spoilt_noise(x_0, seed, purpose, examples):
        noise = draw_noise(x_0, seed, purpose, examples)
        for row, k in zip(noise, examples.tolist()):
            if k in spoilt and purpose == "train":
                row[0, 0, 0] = float(value)
        return noise

    setattr(train, "draw_noise", draw_spoilt_noise)
    if quick_pictures:
        setattr(train, "write_pictures", lambda out, step, *_: train.write_log(
            out, step=step, pictures=1))


def mount_tmpfs(path, size):
    """A small disk for this process alone; exit code 77 where the system lets nobody mount one."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000):                   # CLONE_NEWUSER, CLONE_NEWNS
        os._exit(77)
    for file, line in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"),
                       ("gid_map", f"0 {group} 1")):
        Path("/proc/self", file).write_text(line)
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(77)


def move_to_a_small_disk(folder, size, exit=os._exit):
    """The folder is on a disk of this size, until the process ends."""
    before = shutil.copytree(folder, f"{folder}-before")
    mount_tmpfs(folder, size)
    shutil.copytree(before, folder, dirs_exist_ok=True)

    def end(code):
        shutil.copytree(folder, f"{folder}-after")
        exit(code)

    os._exit = end
