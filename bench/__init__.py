"""Speed as figures: ratios against peers or the machine's own limit, taken in one run, the output verified."""
