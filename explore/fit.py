"""Fit the planner's constants to what `tune.py times` has measured, and write them into it."""
import json, re, sys
import numpy as np
from scipy.optimize import nnls
G = {"lstm": 4, "gru": 3, "rnn": 1}
DEFAULT = np.array([0.37, 0.005, 0.004, 1.09, 0.0003, 0.0066, 0.3])
A, names = [], []
for line in open(sys.argv[1]):
    if not line.startswith("{"): continue
    r = json.loads(line)
    if "us" not in r: continue
    p = r["plan"]; kernel, cell, dt, H, N = r["point"].split("-")[:5]; H, N = int(H[1:]), int(N[1:])
    item = 4 if dt == "float32" else 2; g = G[cell]; gp = {1: 1, 3: 4, 4: 4}[g]
    inner = H * (g if kernel == "backward" else 1)
    rows = p["block_h"] * (gp if kernel == "forward" else 1)
    bn, w, threads = p["block_n"], p["warps"], 32 * p["warps"]
    blocks = -(-inner // (w * p["block_k"]))
    elements = max(1, p["block_h"] * bn // threads)
    loaded = blocks * w * p["block_k"] * bn * item / 1e3
    every = loaded * p["units"] * p["slots"] / 1e3
    products = max(16, rows) // 16 * blocks * 2 * bn // 8 * w // 4 * item // 2
    shared = w * 4 * (rows * bn + rows // p["block_h"] * elements * threads) / 1e3
    turns = -(-(-(-N // bn)) // p["slots"])
    t = r["us"] / turns
    A.append(np.array([1, loaded, every, every**0.5, products, shared, p['units'] * p['slots'] * w / 1e3]) / t)
    names.append(f"{r['point']} {p['block_h']}x{bn} w{w} {r['us']:.2f}")
A = np.array(A); y = np.ones(len(A))
keep = np.sqrt(0.02)
c, _ = nnls(np.vstack([A, np.diag(keep / DEFAULT)]), np.concatenate([y, keep * np.ones(7)]))
print("constants", [round(float(x), 5) for x in c])
for n, a in zip(names, A): print(f"{n:52s} model/measured {float(a @ c):.2f}")
if len(A) > 15 and len(sys.argv) > 2:
    s = open("triton_rnn/kernels/plan.py").read()
    s = re.sub(r"_HELD_US = \(.*\)", "_HELD_US = (" + ", ".join(f"{x:.4f}" for x in c) + ")", s)
    open("triton_rnn/kernels/plan.py", "w").write(s)
