/* The cells: one unit-vector of one row, forward and backward. */

/* LSTM's gates, and c after the step, of one unit-vector of one row. */
INLINE vec lstm_c(const vec *preact, vec before, vec *kept)
{
    kept[0] = sigmoid(preact[0]);
    kept[1] = sigmoid(preact[1]);
    kept[2] = hyperbolic_tangent(preact[2]);
    kept[3] = sigmoid(preact[3]);
    kept[4] = before;
    return kept[1] * kept[4] + kept[0] * kept[2];
}
/* Backward, from the gradients of that c and of o. */
INLINE void lstm_grads(const vec *kept, vec grad_c, vec grad_o, vec *dc, vec *grads)
{
    const REAL one = 1;
    vec i = kept[0], f = kept[1], g = kept[2], o = kept[3], c = kept[4];
    grads[0] = grad_c * g * i * (one - i);
    grads[1] = grad_c * c * f * (one - f);
    grads[2] = grad_c * i * (one - g * g);
    grads[3] = grad_o * o * (one - o);
    *dc = grad_c * f;
}

/* One unit-vector of one row, forward. preact: the gates' preactivations; of GRU's new gate the
   state's part, and its input's part is `other`. Returns what the state's product is made of next:
   h, or for a projected LSTM what W_hr is to multiply. kept: h before the step lies ahead of it,
   then RNN: h; GRU: r, z, n, the state's part of n; LSTM: i, f, g, o, c before the step;
   projected: these and the result. `clip` is the largest |c|, 0 for any. Here and in cell_backward,
   `cell` is a constant and one for both kinds of RNN (`relu` tells) and of LSTM. */
INLINE vec cell_forward(int cell, int relu, const vec *preact, vec other, vec before, REAL *c,
                        REAL clip, vec *kept)
{
    if (cell == RNN_TANH) {
        vec x = preact[0];
        kept[0] = relu ? choose(x < 0, (vec){0}, x) : hyperbolic_tangent(x);
        return kept[0];
    }
    if (cell == GRU) {
        kept[0] = sigmoid(preact[0]);
        kept[1] = sigmoid(preact[1]);
        kept[2] = hyperbolic_tangent(other + kept[0] * preact[2]);
        kept[3] = preact[2];
        return kept[2] + kept[1] * (before - kept[2]);
    }
    vec now = lstm_c(preact, load(c), kept);
    if (clip > 0)
        now = clipped(now, clip);
    store(c, now);
    kept[5] = kept[3] * hyperbolic_tangent(now);
    return kept[5];
}

/* One unit-vector of one row, backward, from the gradient of the step's result. Writes grads, the
   gradients of the preactivations; adds to and replaces *dc; returns what h before the step gets
   other than by W_hh. */
INLINE vec cell_backward(int cell, int relu, vec dh, vec before, const vec *kept, REAL clip, vec *dc,
                         vec *grads)
{
    const REAL one = 1;
    if (cell == RNN_TANH) {
        vec h = kept[0];
        grads[0] = relu ? choose(h <= 0, (vec){0}, dh) : dh * (one - h * h);
        return (vec){0};
    }
    if (cell == GRU) {
        vec r = kept[0], z = kept[1], n = kept[2];
        grads[1] = dh * (before - n) * z * (one - z);
        grads[2] = dh * (one - z) * (one - n * n);
        grads[0] = grads[2] * kept[3] * r * (one - r);
        grads[3] = grads[2] * r;
        return dh * z;
    }
    vec i = kept[0], f = kept[1], g = kept[2], o = kept[3], c = kept[4];
    vec now = f * c + i * g;
    vec t = hyperbolic_tangent(clip > 0 ? clipped(now, clip) : now);
    vec grad_c = *dc + dh * o * (one - t * t);
    if (clip > 0)
        grad_c = choose((now <= clip) & (now >= -clip), grad_c, (vec){0});
    lstm_grads(kept, grad_c, dh * t, dc, grads);
    return (vec){0};
}

#if HAS_OWN
#define EACH_LANE(function, x)                                                                      \
    ({                                                                                              \
        vec result_;                                                                                \
        for (int lane_ = 0; lane_ < LANES; lane_++)                                                 \
            result_[lane_] = IS_FLOAT ? function##f((x)[lane_]) : function((x)[lane_]);             \
        result_;                                                                                    \
    })
INLINE vec magnitude(vec x)
{
    return (vec)((bits)x & ~(bits)all(-(REAL)0));
}
#include "own_cell.h"
#endif
