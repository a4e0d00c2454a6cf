"""
`python -m theory`: the verdict on every claim; section 9 of theory/README.md explains the words.

    python -m theory            # 10 seconds on one thread; writes no file
    python -m theory --draw     # and the figures of theory/README.md, into assets/
"""

import argparse
import textwrap

from theory.claims import table


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="also draw the figures into assets/")
    options, indent = parser.parse_args(arguments), 15 * " "
    for equation, claim, evidence, verdict in table():
        for text, first in ((f"{verdict:<14} {equation}: {claim}", ""), (evidence, indent)):
            print(textwrap.fill(text, 100, initial_indent=first, subsequent_indent=indent,
                                break_on_hyphens=False))
    if options.draw:
        from theory.figures import draw                    # matplotlib only where it is needed
        draw()


if __name__ == "__main__":
    main()
