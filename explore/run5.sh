export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
for i in $(seq 0 14); do OMP_NUM_THREADS=1 timeout -s KILL 30 python3 explore/tune.py warm $i 15 > /tmp/w$i 2>&1 & done
wait
cat /tmp/w* | grep -v Warn | cut -c1-300 | head -20
echo compiled $SECONDS
timeout -s KILL 20 python3 explore/tune.py times 12 > $OUT/times 2> $OUT/table; cut -c1-165 $OUT/table
echo $SECONDS
timeout 10 python3 explore/fit.py $OUT/times write 2>&1 | tee $OUT/fit | head -1
echo $SECONDS
timeout -s KILL $((255 - SECONDS)) python3 -m bench.gpu_session $OUT/s --part correctness --part timing --minutes $(python3 -c "print((228 - $SECONDS) / 60 + 0.25)") > $OUT/log 2>&1
tail -60 $OUT/log | cut -c1-220
echo $SECONDS
