/* Puts the arguments of recurrence.c's functions together, faster than Python can.

   What is done here, Python can do too, and does where this file cannot be compiled or the torch at
   hand has no exchange API (`_call` of __init__.py, which is the definition): the two agree on every
   call. A call of a few steps is a microsecond of arithmetic, and asking a dozen tensors for their
   pointers and strides from Python takes ten.

   Neither Python's headers nor torch's are needed. Functions of Python's are those of its stable ABI
   (docs.python.org/3/c-api/stable.html), declared here. A tensor is looked at by the function that
   torch gives for that, the DLPack exchange API (dmlc.github.io/dlpack, `DLPackExchangeAPI`), which
   fills a record and keeps nothing. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

typedef struct _object PyObject;
typedef intptr_t Py_ssize_t;
extern PyObject _Py_NoneStruct;
PyObject *PyCFunction_NewEx(void *definition, PyObject *self, PyObject *module);
PyObject *PyErr_Occurred(void);
void PyErr_Clear(void);
void *PyEval_SaveThread(void);
void PyEval_RestoreThread(void *state);
char *PyBytes_AsString(PyObject *bytes);
void *PyLong_AsVoidPtr(PyObject *number);
PyObject *PyLong_FromLong(long number);
PyObject *PyObject_CallMethodObjArgs(PyObject *object, PyObject *name, ...);
int PyObject_IsTrue(PyObject *object);
PyObject *PySequence_GetItem(PyObject *sequence, Py_ssize_t index);
Py_ssize_t PySequence_Size(PyObject *sequence);
PyObject *PyUnicode_InternFromString(const char *text);
void Py_DecRef(PyObject *object);
typedef struct {
    const char *name;
    PyObject *(*function)(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
    int flags;
    const char *doc;
} Definition;
enum { METH_FASTCALL = 0x80 };

typedef struct {
    void *data;
    struct {
        int32_t type, number;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const i64 *shape, *strides;
    uint64_t byte_offset;
} Tensor;
typedef struct {
    uint32_t major, minor;
    void *older, *allocate, *from_object, *to_object;
    int (*look_at)(void *object, Tensor *tensor);
} Exchange;

static const Exchange *exchange;
static PyObject *is_neg;

/* A tensor, of which `dense` of the last dimensions have to lie without gaps; 0 where it is out of
   the ordinary. Nothing, for None. */
static int look_at(PyObject *object, int dense, Tensor *tensor)
{
    if (object == &_Py_NoneStruct) {
        memset(tensor, 0, sizeof *tensor);
        return 1;
    }
    if (exchange->look_at(object, tensor)) {
        PyErr_Clear();
        return 0;
    }
    /* Nothing in the record says so of a lazy minus. */
    PyObject *negative = PyObject_CallMethodObjArgs(object, is_neg, NULL);
    const int lazy = !negative || PyObject_IsTrue(negative);
    if (negative)
        Py_DecRef(negative);
    else
        PyErr_Clear();
    if (lazy || tensor->device.type != 1)
        return 0;
    tensor->data = (char *)tensor->data + tensor->byte_offset;
    i64 expected = 1;
    for (int i = tensor->dimensions - 1; i >= 0 && dense--; i--) {
        if (tensor->shape[i] == 0)
            return 1;
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected)
            return 0;
        expected *= tensor->shape[i];
    }
    return 1;
}
static int pointer_of(PyObject *object, i64 *pointer)
{
    Tensor tensor;
    if (!look_at(object, 64, &tensor))
        return 0;
    *pointer = (i64)(intptr_t)tensor.data;
    return 1;
}

/* What `struct Call` of recurrence.c holds, in its order. */
enum { SEQ_LEN = 1, BATCH = 2, SHARED = 9, OWN = 23, BACKWARD = 17 };
enum { MOST_WEIGHTS = 10, MEMORY = 1, UNUSUAL = 2 };

/* The pointers of a direction's weights at their places. `slots` says which of `tensors` is at each,
   from the one `first` on; nothing where it says more than there are. */
static int weights_of(PyObject *tensors, Py_ssize_t first, const char *slots, i64 *to)
{
    const Py_ssize_t count = PySequence_Size(tensors) - first;
    i64 pointers[MOST_WEIGHTS + 1] = {0};
    if (count < 0 || count > MOST_WEIGHTS)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *one = PySequence_GetItem(tensors, first + i);
        const int there = one && pointer_of(one, &pointers[i]);
        if (one)
            Py_DecRef(one);
        if (!there)
            return 0;
    }
    for (int place = 0; place < MOST_WEIGHTS; place++)
        to[place] = slots[place] < count ? pointers[(int)slots[place]] : 0;
    return 1;
}

/* In this order: the function's address; the bytes that calls share, the weights' places, those of
   the team; the address of the batch sizes or 0; input, h_0, c_0, the weights, output, h_n, c_n,
   saved; the three gradients of the results; what is to be computed, a sequence, or None; the bytes
   of an Extras or None. Returns 0; MEMORY if the function has none; UNUSUAL if it was not called. */
static PyObject *call(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    i64 fields[SHARED + OWN + BACKWARD] = {0}, *own = fields + SHARED, *backward = own + OWN;
    Tensor input, grad;
    (void)self;
    if (count != 18)
        return PyLong_FromLong(UNUSUAL);
    memcpy(fields, PyBytes_AsString(arguments[1]), SHARED * sizeof(i64));
    const char *slots = PyBytes_AsString(arguments[2]);
    memcpy(own + 20, PyBytes_AsString(arguments[3]), 3 * sizeof(i64));
    own[0] = (i64)(intptr_t)PyLong_AsVoidPtr(arguments[4]);
    if (!look_at(arguments[5], 1, &input))
        return PyLong_FromLong(UNUSUAL);
    own[1] = (i64)(intptr_t)input.data;
    if (input.dimensions == 2) {
        own[3] = input.strides[0];
    } else {
        /* So that rows lie in order if they can. */
        own[2] = fields[SEQ_LEN] == 1 ? fields[BATCH] * input.strides[1] : input.strides[0];
        own[3] = fields[BATCH] == 1 ? own[2] : input.strides[1];
    }
    if (!pointer_of(arguments[6], own + 4) || !pointer_of(arguments[7], own + 5)
        || !weights_of(arguments[8], 0, slots, own + 6))
        return PyLong_FromLong(UNUSUAL);
    for (int i = 0; i < 4; i++)
        if (!pointer_of(arguments[9 + i], own + 16 + i))
            return PyLong_FromLong(UNUSUAL);
    if (arguments[16] != &_Py_NoneStruct) {
        if (!look_at(arguments[13], 1, &grad) || !pointer_of(arguments[14], backward + 1)
            || !pointer_of(arguments[15], backward + 2))
            return PyLong_FromLong(UNUSUAL);
        backward[0] = (i64)(intptr_t)grad.data;
        backward[3] = grad.data ? grad.strides[0] : 0;
        for (int i = 0; i < 3; i++) {
            PyObject *one = PySequence_GetItem(arguments[16], i);
            const int there = one && pointer_of(one, backward + 4 + i);
            if (one)
                Py_DecRef(one);
            if (!there)
                return PyLong_FromLong(UNUSUAL);
        }
        if (!weights_of(arguments[16], 3, slots, backward + 7))
            return PyLong_FromLong(UNUSUAL);
    }
    const void *extras =
        arguments[17] == &_Py_NoneStruct ? NULL : PyBytes_AsString(arguments[17]);
    i64 (*plain)(const void *) = (i64(*)(const void *))PyLong_AsVoidPtr(arguments[0]);
    i64 (*extended)(const void *, const void *) = (i64(*)(const void *, const void *))plain;
    if (PyErr_Occurred())
        return NULL;
    void *state = PyEval_SaveThread();
    const i64 failed = extras ? extended(fields, extras) : plain(fields);
    PyEval_RestoreThread(state);
    return PyLong_FromLong(failed ? MEMORY : 0);
}

/* `call` as a function of Python's. */
__attribute__((visibility("default"))) PyObject *function(const Exchange *given)
{
    static Definition definition = {"call", call, METH_FASTCALL, NULL};
    exchange = given;
    is_neg = PyUnicode_InternFromString("is_neg");
    return is_neg ? PyCFunction_NewEx(&definition, NULL, NULL) : NULL;
}
