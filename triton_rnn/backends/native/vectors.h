/* Numbers, vectors of them, and what is computed vector by vector. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define MOST_ROWS 4
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define MOST_ROWS 3 /* sixteen registers */
#else
#define VECTOR_BYTES 16
#define MOST_ROWS 4
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Hold a vector in a register: compilers would rather read it from memory for each of the rows, and
   there are as many loads in a cycle as multiply-adds, not more. */
#if defined(__x86_64__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector) ((void)0)
#endif

/* What a processor wants to be told between two looks at memory that another one is to write. */
#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE ((void)0)
#endif

typedef int64_t i64;

#ifndef REAL
#define REAL float
#endif
enum { IS_FLOAT = sizeof(REAL) == 4 };
#define LANES ((i64)(VECTOR_BYTES / sizeof(REAL)))

/* A vector in a register, one that may lie anywhere, and the bits of one. */
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL vec_anywhere
    __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) bits;

INLINE vec load(const REAL *from)
{
    return *(const vec_anywhere *)from;
}
INLINE void store(REAL *to, vec value)
{
    *(vec_anywhere *)to = value;
}
INLINE vec all(REAL value)
{
    return value - (vec){0};
}
/* The first `count` numbers of a caller's row, zeros behind them. */
INLINE vec load_some(const REAL *from, i64 count)
{
    if (count >= LANES)
        return load(from);
    vec value = {0};
    for (i64 lane = 0; lane < count; lane++)
        value[lane] = from[lane];
    return value;
}
INLINE void store_some(REAL *to, vec value, i64 count)
{
    if (count >= LANES)
        store(to, value);
    else
        for (i64 lane = 0; lane < count; lane++)
            to[lane] = value[lane];
}
INLINE vec choose(bits mask, vec yes, vec no)
{
    return (vec)(((bits)yes & mask) | ((bits)no & ~mask));
}
INLINE i64 padded(i64 count)
{
    return (count + LANES - 1) / LANES * LANES;
}

/* 1 where a mask is set, 0 where not: the first `count` of a vector. */
INLINE vec load_mask(const uint8_t *from, i64 count)
{
    vec value = {0};
    for (i64 lane = 0; lane < (count < LANES ? count : LANES); lane++)
        value[lane] = from[lane];
    return value;
}
/* The sum of all lanes. */
INLINE REAL total_of(vec x)
{
    REAL part[LANES];
    UNROLL for (int lane = 0; lane < LANES; lane++) part[lane] = x[lane];
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        UNROLL for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
    return part[0];
}
/* The lesser and the greater of x and a limit; NaN stays NaN. One instruction, which returns its first
   operand, as this order of operands has it, where either is NaN; compilers make four of `choose`. */
#if defined(__AVX__)
#define EXTREME(name, instruction, sign)                                                            \
    INLINE vec name(vec x, REAL limit)                                                              \
    {                                                                                               \
        const vec limits = all(limit);                                                              \
        vec found;                                                                                  \
        if (IS_FLOAT)                                                                               \
            __asm__(instruction "ps %1, %2, %0" : "=v"(found) : "v"(x), "v"(limits));               \
        else                                                                                        \
            __asm__(instruction "pd %1, %2, %0" : "=v"(found) : "v"(x), "v"(limits));               \
        return found;                                                                               \
    }
#else
#define EXTREME(name, instruction, sign)                                                            \
    INLINE vec name(vec x, REAL limit)                                                              \
    {                                                                                               \
        return choose(x sign limit, all(limit), x);                                                 \
    }
#endif
EXTREME(at_most, "vmin", >)
EXTREME(at_least, "vmax", <)
INLINE vec clipped(vec x, REAL limit)
{
    return at_least(at_most(x, limit), -limit);
}


/* e^x. Reduction to |r| <= ln2/2 and the polynomials are those of the Cephes library (S. Moshier,
   netlib.org/cephes: expf.c, exp.c). The power of two is put together in the exponent's bits by
   adding a number so large that its last bits are the integer; a NaN stays one by way of r. From
   about 88.4 (709) on infinite, from -87.7 (-708.7) on zero. */
INLINE vec exponential(vec x)
{
    const REAL high = IS_FLOAT ? 89 : 710, low = IS_FLOAT ? -88 : -709;
    /* 1.5 * 2^23 and 1.5 * 2^52; ln 2 in two parts. */
    const REAL shift = IS_FLOAT ? 12582912.0 : 6755399441055744.0;
    const REAL log2_high = IS_FLOAT ? 0.693359375 : 6.93145751953125e-1;
    const REAL log2_low = IS_FLOAT ? -2.12194440e-4 : 1.42860682030941723212e-6;
    const int mantissa = IS_FLOAT ? 23 : 52, bias = IS_FLOAT ? 127 : 1023;
    x = at_least(at_most(x, high), low);
    vec shifted = x * (REAL)1.44269504088896340736 + shift;
    vec power = shifted - shift;
    vec r = x - power * log2_high - power * log2_low, z = r * r;
    bits exponent = ((bits)shifted - (bits)all(shift) + bias) << mantissa;
    if (IS_FLOAT) {
        vec p = all((REAL)1.9875691500e-4);
        p = p * r + (REAL)1.3981999507e-3;
        p = p * r + (REAL)8.3334519073e-3;
        p = p * r + (REAL)4.1665795894e-2;
        p = p * r + (REAL)1.6666665459e-1;
        p = p * r + (REAL)5.0000001201e-1;
        return (p * z + r + (REAL)1) * (vec)exponent;
    }
    vec p = all((REAL)1.26177193074810590878e-4);
    p = p * z + (REAL)3.02994407707441961300e-2;
    p = (p * z + (REAL)1) * r;
    vec q = all((REAL)3.00198505138664455042e-6);
    q = q * z + (REAL)2.52448340349684104192e-3;
    q = q * z + (REAL)2.27265548208155028766e-1;
    q = q * z + (REAL)2;
    return ((REAL)1 + (REAL)2 * p / (q - p)) * (vec)exponent;
}

INLINE vec sigmoid(vec x)
{
    return (REAL)1 / ((REAL)1 + exponential(-x));
}
/* Near zero the polynomials of Cephes (tanhf.c, tanh.c), which keep the relative error small;
   beyond, by e^2x. */
INLINE vec hyperbolic_tangent(vec x)
{
    const bits sign = (bits)all(-(REAL)0);
    vec size = (vec)((bits)x & ~sign), z = x * x, p, near;
    if (IS_FLOAT) {
        p = all((REAL)-5.70498872745e-3);
        p = p * z + (REAL)2.06390887954e-2;
        p = p * z - (REAL)5.37397155531e-2;
        p = p * z + (REAL)1.33314422036e-1;
        p = p * z - (REAL)3.33332819422e-1;
    } else {
        p = all((REAL)-9.64399179425052238628e-1);
        p = p * z - (REAL)9.92877231001918586564e1;
        p = p * z - (REAL)1.61468768441708447952e3;
        vec q = z + (REAL)1.12811678491632931402e2;
        q = q * z + (REAL)2.23548839060100448583e3;
        p /= q * z + (REAL)4.84406305325125486048e3;
    }
    near = p * z * size + size;
    vec far = (REAL)1 - (REAL)2 / (exponential(size + size) + (REAL)1);
    return (vec)((bits)choose(size < (REAL)0.625, near, far) | ((bits)x & sign));
}
