"""train.py whose data are spoilt: in some examples, one value of the noise is not what it was.

    python planted.py nan 9 10 -- OPTIONS OF TRAIN.PY         # NaN in examples 9 and 10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample
import train

draw_noise = train.draw_noise


def main():
    end = sys.argv.index("--")
    value, spoilt = float(sys.argv[1]), [int(word) for word in sys.argv[2:end]]
    sys.argv = [sys.argv[0], *sys.argv[end + 1:]]

    def draw_spoilt_noise(x_0, seed, purpose, examples):
        noise = draw_noise(x_0, seed, purpose, examples)
        for row, k in enumerate(examples.tolist()):
            if k in spoilt and purpose == "train":
                noise[row, 0, 0, 0] = value
        return noise

    train.draw_noise = draw_spoilt_noise
    try:
        return train.main()
    finally:
        train.draw_noise = draw_noise


if __name__ == "__main__":
    sample.run(main)
