"""warm I N | times | once: held plans of some points."""
import dataclasses, json, sys, os, time as clock
sys.path.insert(0, os.getcwd())
import torch
from bench import gpu_inside
from bench.gpu_grid import TuningPoint
from triton_rnn.backends.triton import launch
from triton_rnn.kernels import plan as planner
D = torch.device("cuda", 0)
R = dataclasses.replace
S = 256
LIST = [
    ("lstm", "float16", 768, 16, "f", ((16,16,8),(16,8,8),(8,16,4),(8,32,8))),
    ("lstm", "float16", 768, 16, "b", ((16,16,8),(16,8,8))),
    ("lstm", "bfloat16", 128, 16, "f", ((32,8,4),(16,8,4),(8,8,4),(16,16,8))),
    ("lstm", "bfloat16", 128, 16, "b", ((32,8,4),(32,8,8),(16,8,4),(8,8,4))),
    ("lstm", "bfloat16", 256, 16, "f", ((16,8,4),(32,8,8),(32,8,4),(8,8,4))),
    ("lstm", "bfloat16", 256, 16, "b", ((32,8,8),(16,8,4))),
    ("gru", "bfloat16", 1024, 64, "f", ((16,16,8),(16,8,8),(8,32,8))),
    ("gru", "bfloat16", 1024, 64, "b", ((16,16,8),(16,32,8))),
    ("lstm", "float32", 512, 64, "f", ((16,16,8),(8,16,8))),
    ("lstm", "float32", 512, 64, "b", ((16,16,8),(16,8,8))),
    ("rnn", "bfloat16", 1024, 16, "f", ((32,8,8),(32,8,4),(16,8,4))),
    ("gru", "bfloat16", 512, 64, "b", ((32,8,8),(16,16,8),(32,16,8))),
]
launch.POLLS = 1 << 16
POINTS = [(TuningPoint(c, d, h, n, {"f": "forward", "b": "backward"}[k], S), w) for c, d, h, n, ks, w in LIST for k in ks]
def plans(point, wanted):
    request = gpu_inside.request_of(point, D)
    chip = launch.chip_of(D)
    shape = launch.shape_of(launch.kernel_cell(request.cell), point.kernel, point.hidden, 1, point.batch, request.dtype.itemsize, 1)
    every = list(planner._held(shape, chip))
    return [p for w in wanted for p in every if (p.block_h, p.block_n, p.warps) == w]
def all_():
    return [(point, k, plan) for point, w in POINTS for k, plan in enumerate(plans(point, w))]
class NoWait:
    def __enter__(self):
        self.zeros, self.unwritten = torch.zeros, launch._unwritten
        torch.zeros = lambda *a, **k: torch.full(a if isinstance(a[0], int) else a[0], 1 << 29, **k) if k.get("dtype") == torch.int32 else self.zeros(*a, **k)
        launch._unwritten = lambda b: None
    def __exit__(self, *e):
        torch.zeros, launch._unwritten = self.zeros, self.unwritten
def time(run, n=5):
    ts = []
    run(False); torch.cuda.synchronize()
    for _ in range(n):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        a.record(); run(False); b.record(); torch.cuda.synchronize()
        ts.append(a.elapsed_time(b))
    return min(ts) / S * 1000
mode = sys.argv[1]
if mode == "warm":
    me, of = int(sys.argv[2]), int(sys.argv[3])
    for i, (point, k, plan) in enumerate(all_()):
        if i % of != me: continue
        try:
            with gpu_inside.planned(plan):
                gpu_inside.recurrence(point, D)(True); torch.cuda.synchronize()
        except Exception as e:
            print("warm", point.id, plan, type(e).__name__, str(e)[:300], flush=True)
            if "CUDA" in str(e): break
elif mode == "times":
    start = clock.time()
    first = {}
    for point, k, plan in all_():
        if clock.time() - start > float(sys.argv[2]): print("out of time"); break
        row = {"point": point.id, "plan": dataclasses.asdict(plan)}
        try:
            with gpu_inside.planned(plan):
                run = gpu_inside.recurrence(point, D)
                t0 = clock.time()
                out = [t.float() for t in run(True)]
                torch.cuda.synchronize()
                row['first'] = clock.time() - t0
                launch.raise_failed_wait(D)
                base = first.setdefault(point.id, out)
                row["diff"] = max(float((a - b).norm() / b.norm()) for a, b in zip(out, base))
                row["us"] = time(run)
                if plan.exchange in ("flag", "barrier"):
                    with NoWait(): row["nowait"] = time(run, 3)
        except Exception as e:
            row["error"] = f"{type(e).__name__} {str(e)[:200]}"
        print(json.dumps(row), flush=True)
        p = plan
        print(f"{point.id:38s} {p.variant[:4]} {p.exchange:7s} {p.block_h}x{p.block_n} w{p.warps} tog{p.together} units{p.units} slots{p.slots} floor {p.floor_us:.2f} us {row.get('us', 0):.3f} nowait {row.get('nowait', 0):.3f} diff {row.get('diff', -1):.1e} first {row.get('first', 0):.2f} {row.get('error', '')}", file=sys.stderr, flush=True)
else:
    for point, w in POINTS[:2]:
        for plan in plans(point, w)[:1]:
            with gpu_inside.planned(plan):
                gpu_inside.recurrence(point, D)(True); torch.cuda.synchronize()
