"""Parts and scripts with known faults, by which tests show that the fuzzers report them."""
