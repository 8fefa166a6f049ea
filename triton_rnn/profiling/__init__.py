"""What a run spends its time on: named ranges, `triton_rnn.profile()`, and the command."""
