#!/usr/bin/env python3
"""Makes digits.bin from scikit-learn's copy of the optdigits test set.

    pip download scikit-learn --no-deps
    unzip -p scikit_learn-*.whl sklearn/datasets/data/digits.csv.gz > digits.csv.gz
    ./make-digits.py digits.csv.gz digits.bin

A line of the input is 64 pixels (0 to 16, row by row) and the label. A record of the output is the
label byte, then the 64 pixel bytes.
"""

import gzip
import sys

source, target = sys.argv[1:]
with gzip.open(source, "rt") as lines, open(target, "wb") as out:
    for line in lines:
        *pixels, label = [int(float(word)) for word in line.split(",")]
        assert len(pixels) == 64 and all(0 <= p <= 16 for p in pixels) and 0 <= label <= 9
        out.write(bytes([label, *pixels]))
