"""What the tests share: fault models, tools, clocks and makers of data."""
