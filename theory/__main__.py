"""
`python -m theory`: the verdict on every claim; section 9 of theory/README.md explains the words.

    python -m theory            # 10 seconds on one thread; writes no file
    python -m theory --draw     # and the figures of theory/README.md, into assets/
"""

import argparse
import textwrap

from theory.claims import table

INDENT = 15


def lines():
    """The table, 100 columns wide: verdict, equation and claim; below them what was found"""
    for row in table():
        head = f"{row.verdict:<{INDENT - 1}} {row.equation}: {row.claim}"
        for text, first in ((head, ""), (row.evidence, " " * INDENT)):
            yield from textwrap.wrap(text, 100, initial_indent=first, break_on_hyphens=False,
                                     subsequent_indent=" " * INDENT)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="also draw the figures into assets/")
    options = parser.parse_args(arguments)
    for line in lines():
        print(line)
    if options.draw:
        from theory.figures import draw                    # matplotlib only where it is needed
        draw()


if __name__ == "__main__":
    main()
