"""Speed as figures: ratios against peers or the machine's own limit, in one run, the output verified."""
