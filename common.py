"""
What the commands share: random streams, files that are never half written, checkpoints and weights,
compiling and memory, processes and devices, options and how a command ends.
"""

import argparse
import ctypes
import dataclasses
import errno
import hashlib
import math
import os
import pickle
import re
import shutil
import signal
import sys
import traceback
import typing
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from dip import (LAST_LAYERS, Block, DiP, DiPConfig, PatchDetailerHead, flow_matching_loss,
                 from_release)

# -------------------------------------------------------------------------------------------------
# Randomness and precision


def random_stream(*key, device="cpu"):
    """A generator that is a function of its key alone: of (seed, what for, index), never of rank,
    batch size or number of workers.  On another kind of device it draws other numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))


def autocast(device):
    """bf16 for the network on CUDA, float32 elsewhere; the ODE's state is float32 everywhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# -------------------------------------------------------------------------------------------------
# Files


def save_atomically(path, write):
    """Call write(temporary path), then move the finished file into place: never half a file, not
    even after a power loss."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())                          # its bytes are on the disk,
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                                 # and so is its name
            os.close(folder)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        if "inline_container" not in line:                   # torch.save's answer to a full disk
            raise
        raise OSError(f"{path} could not be written; is the disk full? ({line})") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def in_one_line(message):
    """Turn whatever reading an untrusted or damaged file raises into one line: the message, and the
    first line of the error.  Errors of the system that may pass (I/O, memory) stay as they are."""
    try:
        yield
    except Exception as error:
        if is_of_the_system(error):
            raise
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{message} ({line})") from None


def is_of_the_system(error):
    """Whether reading failed for a reason that is not in the file, and may pass."""
    passing = errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in passing


@contextmanager
def locked(out, wait=False):
    """Inside, this process alone writes into the folder; if another does it is an error, or waited
    for.  A lock of the system, which ends with the process, however it ends; loader processes do
    not inherit it."""
    try:
        import fcntl
    except ImportError:                                      # no such lock on Windows
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise ValueError(f"--out {out}: another run is writing there; wait for its end, or "
                             f"choose another --out") from None
        yield


# -------------------------------------------------------------------------------------------------
# Weights and checkpoints: dicts of builtins and tensors, so that weights_only=True can open them

OUR_WEIGHTS = Path(__file__).parent / "assets" / "dip-nano.pt"
CHECKPOINT = {"config": dict, "ema": dict, "step": int, "classes": list, "names": list,
              "options": dict}                               # enough to sample from
RESUMABLE = {"model": dict, "optimizer": dict, "unlogged": torch.Tensor, "images": int}


def write_checkpoint(out, keep, **state):
    """Save ckpt-<step>.pt whole or not at all, then drop the oldest beyond `keep`."""
    check_finite(out, state["model"])
    path = out / f"ckpt-{state['step']:08d}.pt"
    save_atomically(path, lambda partial: torch.save(state, partial))
    saved = sorted(out.glob("ckpt-*.pt"))
    for old in [file for file in saved if file <= path][:-keep]:     # of later steps: not counted
        old.unlink()


def write_weights(path, model, info):
    """The weights alone, rounded to bfloat16: what assets/ holds, and what one shares."""
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    state = dict(config=asdict(model.config), ema=weights, step=info["step"],
                 classes=info["classes"], names=info["names"],
                 options={"model": info["options"].get("model", "")})        # for --init's recipe
    save_atomically(path, lambda partial: torch.save(state, partial))


def read_file(path):
    """What a .pt or .safetensors file holds, tensors mapped from the file; runs no code from it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `python train.py` makes one under runs/")
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path}: reading it needs the safetensors package; "
                             f"`pip install safetensors`, or give a .pt file") from None
        with in_one_line(f"{path} is not a .safetensors file, or not all of it is there"):
            return load_file(path)
    with in_one_line(f"{path} is not a checkpoint, or not all of it is there"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            if not foreign:
                raise
    raise ValueError(
        f"{path} holds more than tensors ({foreign[1]}) and may run code when opened; if you trust "
        f"it: python -c \"import torch; torch.save(torch.load('{path}', weights_only=False, "
        f"map_location='cpu')['state_dict'], 'weights.pt')\" and use weights.pt")


def check_types(path, state, types):
    """Refuse what is not a dict with these keys, each with a value of its type."""
    wrong = [key for key, kind in types.items()
             if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(wrong)}")


def load_checkpoint(path, verify=False):
    """The dict that train.py saved, its tensors mapped from the file.  Runs no code from it.

    verify: also compare every byte with the checksums in the file, which torch.load does not do.
    """
    state = read_file(path)
    check_types(path, state, CHECKPOINT | RESUMABLE)
    if verify:
        with in_one_line(f"{path} is damaged"):
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"{damaged} in it does not have its checksum")
    return state


def newest_intact(folder, verify=False):
    """Path of the last readable checkpoint of a run, or None where there is no checkpoint at all.

    Names the broken ones it passes over; if all are, that is an error and no new beginning.
    """
    paths = sorted(Path(folder).glob("ckpt-*.pt"), reverse=True)
    for path in paths:
        try:
            load_checkpoint(path, verify)
            return path
        except (ValueError, FileNotFoundError) as error:     # damaged, or dropped meanwhile
            print(f"warning: {error}; passed over")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is intact")


def find_checkpoint(given=None):
    """Path of a checkpoint: the file given, or the newest below the folder given or runs/; without
    any, our own small weights."""
    path = Path(given or "runs")
    if given and not path.is_dir():
        return path
    newest = max(path.glob("**/ckpt-*.pt"), key=lambda found: found.stat().st_mtime, default=None)
    if newest is None and (given or not OUR_WEIGHTS.exists()):
        raise FileNotFoundError(f"no checkpoint under {path}/; `python train.py` makes one")
    return newest_intact(newest.parent) if newest else OUR_WEIGHTS


def load_model(path, device="cpu", ema=True):
    """(model in eval mode, dict of what is known of it: config, step, classes, names, options)

    path: a checkpoint of train.py, or a folder of them; a Lightning checkpoint of the release
    (ema_denoiser. or, without ema, denoiser.); a state dict in the release's names, .pt or
    .safetensors.  Float32 weights, each checked to be finite.
    """
    path = find_checkpoint(path)
    state = read_file(path)
    if isinstance(state, dict) and "config" in state:
        weights, config, info = read_ours(path, state, ema)
    else:
        weights, config, info = read_release(path, state, ema)
    with torch.device("meta"), in_one_line(f"{path}: its configuration cannot be built"):
        model = DiP(config)                                  # shapes alone, no memory
    check_fit(path, model, weights)
    weights = {name: weight.to(device, torch.float32, copy=True)
               for name, weight in weights.items()}
    check_finite(path, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), info


def read_ours(path, state, ema):
    """(weights, DiPConfig, info) of a checkpoint of train.py, or of weights written from one"""
    check_types(path, state, CHECKPOINT)
    weights, labels = state["ema"] if ema else state.get("model"), state["classes"] + state["names"]
    if weights is None:
        raise ValueError(f"{path} has the averaged weights alone: leave out --no-ema")
    with in_one_line(f"{path}: its configuration cannot be used"):
        for field in ("depth", "head_depth"):                # else a hostile 2 ** head_depth hangs
            if state["config"].get(field, 0) > len(weights):
                raise ValueError(f"{len(weights)} weights for {field}={state['config'][field]}")
        config = DiPConfig(**state["config"])
        if len(labels) != 2 * config.num_classes or not all(isinstance(x, str) for x in labels):
            raise ValueError(f"classes and names are not {config.num_classes} texts each")
    return weights, config, {key: value for key, value in state.items()
                             if key not in ("model", "ema", "optimizer", "unlogged")}


def read_release(path, state, ema):
    """(weights, DiPConfig, info) of the authors' weights, from a Lightning checkpoint or bare"""
    with in_one_line(f"{path} is neither a checkpoint of train.py nor weights of a released DiP"):
        weights = state.get("state_dict", state)
        prefix = "ema_denoiser." if ema else "denoiser."
        if any("denoiser." in name for name in weights):
            weights = {name.removeprefix(prefix): weight for name, weight in weights.items()
                       if name.startswith(prefix)}
        if not weights:
            raise ValueError(f"no weights named {prefix}*; try {'--no-ema' if ema else '--ema'}")
        config, weights = from_release(weights)
        known = imagenet_names() if config.num_classes == 1000 else {}
        numbers = [f"class {k}" for k in range(config.num_classes)]
        return weights, config, dict(
            config=asdict(config), step=int(state.get("global_step", 0)), options={},
            classes=list(known) or numbers, names=list(known.values()) or numbers)


def check_fit(path, model, weights):
    """Refuse weights that are not those of the model, naming the first few that differ."""
    ours = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    shapes = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    other = [f"{name} {shapes[name]} there, {ours[name]} here" for name in ours
             if name in shapes and shapes[name] != ours[name]]
    kinds = {"missing": [name for name in ours if name not in shapes], "of another shape": other,
             "unexpected": [name for name in shapes if name not in ours]}
    found = [f"{kind}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
             for kind, names in kinds.items() if names]
    if found:
        line = " ".join("; ".join(found).split())            # a foreign name may hold line breaks
        raise ValueError(f"{path}: weights and model do not fit; {line}")


def check_finite(path, weights):
    """Refuse weights that are not finite: they would silently draw black images."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{path}: weight {name} is not finite; use an earlier checkpoint, "
                             f"or train again with a lower --lr")


def imagenet_names():
    """{wnid: readable name} in the usual order of the 1000 classes, that of the sorted wnids."""
    lines = (Path(__file__).parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


# -------------------------------------------------------------------------------------------------
# The model in pieces, in bfloat16, and the memory that its training takes


def pieces(model):
    """The modules that are compiled, or recomputed in the backward pass, one at a time: each Block,
    and each head that is not made of Blocks."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    heads = [module.head for module in model.modules() if isinstance(module, PatchDetailerHead)]
    return blocks + [head for head in heads
                     if not any(isinstance(module, Block) for module in head.modules())]


def compile_pieces(model):
    """torch.compile, one piece at a time: seconds a piece, where the whole takes minutes."""
    for module in pieces(model):
        module.forward = torch.compile(module.forward)


def keep_in_bf16(model):
    """Cast once the weights that autocast casts at every evaluation, all except last layers, which
    run in float32: the same bits in less time."""
    kinds = nn.Linear, nn.Conv2d, nn.ConvTranspose2d
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not name.endswith(LAST_LAYERS):
            module.bfloat16()


def memory_needed(config, dtype=None, grad_checkpoint=False):
    """Estimated bytes of training, (fixed, per image of a micro-batch): weights, gradients, Adam's
    two moments, EMA and half as much for weights cast to dtype; activations.  Nothing is computed:
    of fake tensors, those kept for the backward pass are counted."""
    from torch._subclasses import FakeTensorMode

    def kept_for_backward(model, B):
        sizes = {}

        def count(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.empty(B, 3, config.image_size, config.image_size)
        features = torch.empty(B, config.repa_dim, 1, 1) if config.repa_dim else None
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            flow_matching_loss(model, x, torch.zeros(B, dtype=torch.long), torch.ones(B), x,
                               features)
        return sum(sizes.values())

    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        model = DiP(config)
        weights = sum(p.nbytes for p in model.parameters())
        one, two = (kept_for_backward(model, B) for B in (1, 2))
    per_image = two - one
    if grad_checkpoint:              # the input of each piece; inside one, twice the average
        tokens = 4 * config.hidden_size * (config.image_size // config.patch_size) ** 2
        per_image = len(pieces(model)) * tokens + 2 * per_image / len(pieces(model))
    return (5.5 if dtype else 5) * weights, per_image


def available_memory(device):
    """Bytes that a process may still use on the device; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # shared by its ranks
    except (OSError, TypeError):                             # no such file, or no such line in it
        return math.inf


# -------------------------------------------------------------------------------------------------
# Processes, devices and signals


@dataclass(frozen=True)
class Processes:
    """The processes of a command.  Every method is collective: all of them call it."""

    rank: int
    world: int
    device: torch.device

    def barrier(self):
        """Nobody goes on before everybody has arrived."""
        if self.world > 1:
            dist.barrier()

    def gather(self, thing):
        """Everybody's thing, by rank."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def on_first(self, function, *arguments):
        """What rank 0, and rank 0 alone, gets from the function; its errors are raised by all."""
        result = error = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except Exception as found:
                error = found
        result, error = self.gather((result, error))[0]
        if error:
            raise error
        return result

    def reduce(self, tensor):
        """The sum over the ranks, in place, and returned."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def read(self, value, flag):
        """(value as a float, whether the flag is set on any rank), with one wait for the device."""
        flags = self.reduce(torch.tensor(float(bool(flag)), device=self.device))
        value, flags = torch.stack([value.float(), flags]).tolist()
        return value, flags > 0


def start_processes(device="auto"):
    """This process among its peers, and its device, after joining torchrun's group if any."""
    many = "RANK" in os.environ                              # under torchrun
    rank = int(os.environ["RANK"]) if many else 0
    world = int(os.environ["WORLD_SIZE"]) if many else 1
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()                 # fails if it is absent, or "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if many and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return Processes(rank, world, device)


@contextmanager
def noted_signals():
    """Inside, SIGTERM and SIGINT are only noted: the loop ends itself at a whole step."""
    noted = []

    def note(number, _):
        noted.append(number)
        os.write(2, b"\nstopping: the step is finished and saved first\n")    # print is not safe

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------
# Command line: a dataclass whose fields carry their help


def option(default, help, **settings):
    """A dataclass field that is also a command line option; `group` starts a group of options."""
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def parse_options(cls, manual, argv=None):
    """Fill the dataclass from the command line; `--help` is one screen, grouped, with defaults."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=manual, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=112))
    types, group = typing.get_type_hints(cls), parser
    for field in dataclasses.fields(cls):
        settings, kind = dict(field.metadata), types[field.name]
        if "group" in settings:
            group = parser.add_argument_group(settings.pop("group"))
        kind = next(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif kind is not tuple:
            settings["type"] = kind
        if kind is not bool and "choices" not in settings:
            settings.setdefault("metavar", kind.__name__.upper())
        if kind is not bool and field.default not in (None, ()):
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            settings["help"] += f" [{' '.join(map(str, default))}]"
        flag = "--" + field.name.strip("_").replace("_", "-")
        group.add_argument(flag, dest=field.name, **settings)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: an unset variable? Leave it "
                             f"out, or name it")
    return cls(**given)


def at_least(minimum, **values):
    """Refuse options that are below their minimum or not finite, by name; None is not given."""
    for name, value in values.items():
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {minimum} "
                             f"and finite")


# -------------------------------------------------------------------------------------------------
# Running a command


def progress(items, what, **settings):
    """A progress bar, also where the terminal does not know its own width."""
    return tqdm(items, what, ncols=shutil.get_terminal_size().columns, **settings)


def explain(error):
    """The line that tells the user what to mend, or None for an error that nobody expected."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    from_loader = lines[0].startswith("Caught ")             # by a worker: its last line counts
    line = lines[-1].removeprefix("ValueError: ") if from_loader else lines[0]
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if exhausted or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "out of memory; a smaller --micro-batch (training) or --batch (sampling) helps"
    if isinstance(error, RuntimeError):
        lost = dist.is_initialized() and re.search("[Cc]onnection (closed|reset)", line)
        return "another process of this command has ended" if lost else None
    return line if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


def keep_freed_memory():
    """glibc returns large blocks to the system as soon as they are freed, and every step faults
    their pages in again: tell it to keep them.  Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, -1)                                      # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)                                       # M_MMAP_MAX: no separate mappings


def run_main(main):
    """Run a command; what the user can mend ends in one line and exit code 1, no traceback."""
    torch.set_flush_denormal(True)           # on a CPU subnormal numbers make a step slow
    keep_freed_memory()
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = explain(error)
        if line is None and not dist.is_initialized():
            raise
        if line is None:
            traceback.print_exc()
        traceback.clear_frames(error.__traceback__)          # frees the DataLoader: its workers end
        code = f"{Path(sys.argv[0]).name}: error: {line or 'unexpected, see above'}"
    if dist.is_initialized():        # leave at once: a group that has lost a member may hang in its
        if not code:                 # teardown, and gloo's threads may abort Python's
            dist.destroy_process_group()
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
