"""The main job, ``python -m triton_rnn demo``: one model trained twice, with torch.nn and with us.

``settings`` checks what was asked for, ``text`` and ``series`` are the two jobs, ``training``
trains and times the pair, ``distributed`` does so in several processes where torchrun started
them, ``plots`` and ``report`` show what came of it; these two need the extra ``triton_rnn[demo]``.
"""
