import ctypes, subprocess, tempfile
class BuildError(Exception): pass
FLAGS = ("-std=gnu11","-O2","-march=native","-fPIC","-shared","-fvisibility=hidden","-fno-math-errno","-fno-trapping-math")
def library(source, extra=()):
    out = tempfile.mktemp(suffix=".so")
    subprocess.run(["gcc", *FLAGS, *extra, str(source), "-o", out], check=True)
    return ctypes.CDLL(out)
