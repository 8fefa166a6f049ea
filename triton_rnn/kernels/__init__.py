"""The Triton kernels. What is here runs on a GPU, or tells how to launch what does.

- `cells`: the pointwise arithmetic of every cell, forward and backward.
- `functions`: sigmoid, tanh and others, which that is made of.
- `exchange`: how the programs of one launch hand each other a state.
- `cluster`: the same for programs that store into each other's shared memory.
- `pieces`: numbers that each thread loads and stores for itself, by PTX.
- `forward`, `backward`: the recurrence, one kernel each, written over the cell.
- `steps`, `product`: what both are made of.
- `matmul`: the products that do not depend on time.
- `chips`, `plan`, `step_time`, `planner`: the devices; which variant, which blocks, how many
  programs; how long a step of that takes; the search for the best (plain Python, no triton).

Layouts, with R = T * N rows, or the sum of the lengths of a packed batch, in time-major order:

    output      (R, D * H)
    gates       (R, D, ROW * H)    the input's projection in the last G * H columns, behind them the
                masks of a cell that has some; the first are replaced by what a backward needs where
                one will follow
    cells       (R, D, H)          the cell state of every step, for an LSTM's backward
    grad_gates  (R, D, WIDTH * H)  gradients: of the P products first, in a ring that begins with
                TURN; of the G inputs behind them, of which the first may be the last products; of
                a row's share of the unit weights
    h_0, c_0, h_n, c_n and their gradients (D, N, H)

ROW and WIDTH are G for an RNN and an LSTM. They are 4 for a GRU that will be differentiated: its
columns are [m r z n], where m = W_hn h + b_hn is the part that the reset gate multiplies. In
`grad_gates` the first three are the gradient of the recurrent product, the last three that of the
input's. Of a cell that was traced (`backends.triton.own`) they are what its step makes of it.

Of a cell that is locked, `output` is what the programs exchange, h times a mask of each sequence,
and h itself is a buffer of its own.
"""
