/* What stands between a module's call and recurrence.c, faster than Python can do it: `call` puts the
   arguments of one layer together, `known` does a whole call of a kind that Python has done before.

   What is done here, Python can do too, and does where this file cannot be compiled or the torch at
   hand has no exchange API: `_call` of __init__.py and `functional.forward` are the definitions, with
   which these agree on every call. A call of a few steps is a microsecond of arithmetic; asking a
   dozen tensors for their shapes and pointers from Python takes ten, and deciding what to do with
   them as long.

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
extern PyObject _Py_NoneStruct, _Py_TrueStruct, _Py_FalseStruct;
extern PyObject PyBytes_Type, PyFloat_Type, PyList_Type, PyLong_Type, PyTuple_Type, PyUnicode_Type;
extern PyObject *PyExc_Exception, *PyExc_MemoryError;
PyObject *PyCFunction_NewEx(void *definition, PyObject *self, PyObject *module);
PyObject *PyErr_Occurred(void);
void PyErr_Clear(void);
int PyErr_ExceptionMatches(PyObject *type);
void PyErr_SetString(PyObject *type, const char *message);
void *PyEval_SaveThread(void);
void PyEval_RestoreThread(void *state);
char *PyBytes_AsString(PyObject *bytes);
Py_ssize_t PyBytes_Size(PyObject *bytes);
PyObject *PyBytes_FromStringAndSize(const char *text, Py_ssize_t size);
PyObject *PyDict_GetItemWithError(PyObject *dictionary, PyObject *key);
double PyFloat_AsDouble(PyObject *number);
long long PyLong_AsLongLong(PyObject *number);
void *PyLong_AsVoidPtr(PyObject *number);
PyObject *PyList_New(Py_ssize_t size);
int PyList_SetItem(PyObject *list, Py_ssize_t index, PyObject *item);
PyObject *PyLong_FromLong(long number);
PyObject *PyLong_FromLongLong(long long number);
PyObject *PyObject_CallFunctionObjArgs(PyObject *function, ...);
PyObject *PyObject_CallMethodObjArgs(PyObject *object, PyObject *name, ...);
PyObject *PyObject_CallNoArgs(PyObject *function);
PyObject *PyObject_GetAttr(PyObject *object, PyObject *name);
int PyObject_IsTrue(PyObject *object);
PyObject *PyObject_Type(PyObject *object);
PyObject *PySequence_GetItem(PyObject *sequence, Py_ssize_t index);
Py_ssize_t PySequence_Size(PyObject *sequence);
PyObject *PyTuple_Pack(Py_ssize_t count, ...);
const char *PyUnicode_AsUTF8AndSize(PyObject *text, Py_ssize_t *size);
PyObject *PyUnicode_InternFromString(const char *text);
void Py_DecRef(PyObject *object);
void Py_IncRef(PyObject *object);
typedef struct {
    const char *name;
    PyObject *(*function)(PyObject *self, PyObject *const *arguments, Py_ssize_t count);
    int flags;
    const char *doc;
} Definition;
enum { METH_FASTCALL = 0x80 };

/* DLPack's numbers for a kind of device and of dtype. */
enum { CPU = 1, INTEGER = 0, FLOATING = 2 };
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
    if (lazy)
        return 0;
    tensor->data = (char *)tensor->data + tensor->byte_offset;
    i64 expected = 1, elements = 1;
    for (int i = 0; i < tensor->dimensions; i++)
        elements *= tensor->shape[i];
    /* Autograd has zeros that lie nowhere. */
    if (elements && !tensor->data)
        return 0;
    for (int i = tensor->dimensions - 1; elements && i >= 0 && dense--; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected)
            return 0;
        expected *= tensor->shape[i];
    }
    return 1;
}
/* Whether recurrence.c can read a tensor, or nothing at all. */
static int is_on_cpu(const Tensor *tensor)
{
    return !tensor->data || tensor->device.type == CPU;
}
static int pointer_of(PyObject *object, i64 *pointer)
{
    Tensor tensor;
    if (!look_at(object, 64, &tensor) || !is_on_cpu(&tensor))
        return 0;
    *pointer = (i64)(intptr_t)tensor.data;
    return 1;
}

/* What `Call` of call.h holds, in its order. */
enum { SEQ_LEN = 1, BATCH = 2, SHARED = 10, OWN = 23, BACKWARD = 17 };
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
    if (!look_at(arguments[5], 1, &input) || !is_on_cpu(&input))
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
        if (!look_at(arguments[13], 1, &grad) || !is_on_cpu(&grad)
            || !pointer_of(arguments[14], backward + 1)
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

/* Known calls. What Python decides about a call follows from facts: attributes of the module, shapes
   and types of tensors, and switches. Here they are gathered, and looked up among those of calls that
   Python has decided about before (calls.py); nothing is decided anew. */

enum { MOST_QUESTIONS = 8, MOST_FACTS = 384, MOST_OWNED = 256, MOST_LAYERS = 8 };

/* Made once, and never given back. */
static PyObject *tensor_type, *parameter_type, *packed_type, *make_packed, *known_calls;
static PyObject *questions[MOST_QUESTIONS], *switches[MOST_QUESTIONS], *is_grad_enabled;
static PyObject *float32_switch;
static Py_ssize_t question_count, switch_count;
static PyObject *new_empty, *dictionary, *parameters, *flat_weights, *requires_grad, *transpose;
static PyObject *index_select;

/* How the results of a call are shaped, see `PADDED` and the others of calls.py. */
enum { PADDED, BATCH_FIRST, UNBATCHED, PACKED, CELL, UNBATCHED_CELL };
/* What Python says about a call: this, and then a Layer for each. Widths are those of a row of the
   output, of h and of c, 0 without c. */
typedef struct {
    i64 form, layers, directions, weights, seq_len, batch, width, h_width, c_width;
} Known;
typedef struct {
    i64 address, team[3], shared[SHARED];
    char slots[16];
} Layer;

/* A PackedSequence's fields, borrowed, and where its batch sizes lie: NULL where they are all equal,
   which is as good as a padded batch. Nothing of another input. */
typedef struct {
    PyObject *data, *batch_sizes, *sorted, *unsorted;
    const i64 *sizes;
} Packed;

/* What was seen of a call, and the references that it holds meanwhile. */
typedef struct {
    i64 facts[MOST_FACTS];
    PyObject *owned[MOST_OWNED];
    PyObject *input, *states[2]; /* borrowed: rows of a packed one; h_0 and c_0 where they are given */
    Packed packed;
    int fact_count, owned_count, usual, has_grad, needs_grad;
} Seen;

static void note(Seen *seen, i64 fact)
{
    if (seen->fact_count < MOST_FACTS)
        seen->facts[seen->fact_count++] = fact;
    else
        seen->usual = 0;
}
/* Nothing, where there is no such object. Errors mean that a call is not usual, and the other way
   will meet them again; but an interrupt comes once, and is left to be raised. */
static PyObject *own(Seen *seen, PyObject *object)
{
    if (!object) {
        if (PyErr_ExceptionMatches(PyExc_Exception))
            PyErr_Clear();
        seen->usual = 0;
    } else if (seen->owned_count < MOST_OWNED) {
        seen->owned[seen->owned_count++] = object;
    } else {
        Py_DecRef(object);
        seen->usual = 0;
        object = NULL;
    }
    return object;
}
static int is_a(PyObject *object, PyObject *type)
{
    PyObject *own_type = PyObject_Type(object);
    Py_DecRef(own_type);
    return own_type == type;
}
static int is_true(PyObject *object)
{
    return object == &_Py_TrueStruct || (object != &_Py_FalseStruct && PyObject_IsTrue(object));
}

/* A number, a truth, a short text or None, each told from the others. */
static void note_value(Seen *seen, PyObject *value)
{
    double number;
    char text[24] = {0};
    Py_ssize_t size = 0;
    i64 words[3];
    if (!seen->usual)
        return;
    if (value == &_Py_NoneStruct) {
        note(seen, 0);
    } else if (value == &_Py_TrueStruct || value == &_Py_FalseStruct) {
        note(seen, value == &_Py_TrueStruct ? 1 : 2);
    } else if (is_a(value, &PyLong_Type)) {
        note(seen, 3);
        note(seen, PyLong_AsLongLong(value));
    } else if (is_a(value, &PyFloat_Type)) {
        number = PyFloat_AsDouble(value);
        memcpy(words, &number, sizeof number);
        note(seen, 4);
        note(seen, words[0]);
    } else if (is_a(value, &PyUnicode_Type)) {
        const char *from = PyUnicode_AsUTF8AndSize(value, &size);
        if (!from || size > (Py_ssize_t)sizeof text)
            seen->usual = 0;
        else
            memcpy(text, from, (size_t)size);
        memcpy(words, text, sizeof text);
        note(seen, 5);
        for (int i = 0; i < 3; i++)
            note(seen, words[i]);
    } else {
        seen->usual = 0;
    }
    if (PyErr_Occurred()) {
        PyErr_Clear();
        seen->usual = 0;
    }
}

/* A tensor, as in look_at; how long it is in the dimensions before `first` is no fact. */
static void note_tensor(Seen *seen, PyObject *object, int dense, int first, Tensor *tensor)
{
    i64 elements = 1;
    if (!seen->usual)
        return;
    if ((!is_a(object, tensor_type) && !is_a(object, parameter_type))
        || !look_at(object, dense, tensor)) {
        seen->usual = 0;
        return;
    }
    note(seen, tensor->dimensions | (i64)tensor->dtype.code << 32 | (i64)tensor->dtype.bits << 40
                   | (i64)tensor->dtype.lanes << 48);
    note(seen, tensor->device.type | (i64)tensor->device.number << 32);
    for (int i = 0; i < tensor->dimensions; i++) {
        if (i >= first)
            note(seen, tensor->shape[i]);
        elements *= tensor->shape[i];
    }
    if (elements == 0)
        seen->usual = 0;
    if (seen->has_grad && !seen->needs_grad && seen->usual) {
        PyObject *needs = own(seen, PyObject_GetAttr(object, requires_grad));
        seen->needs_grad = needs && is_true(needs);
    }
}

/* What stands under a name in a dictionary: borrowed, NULL without an error where there is nothing. */
static PyObject *found_in(Seen *seen, PyObject *dictionary, PyObject *name)
{
    PyObject *found = dictionary ? PyDict_GetItemWithError(dictionary, name) : NULL;
    if (!found && PyErr_Occurred())
        own(seen, NULL);
    return found;
}

/* The module's weights by their names, and their pointers; how many. A bias that is None is none. Not
   usual is what a user has put in their place: attributes of the same names, which hide parameters, or
   other tensors in the list that torch's layers multiply by. */
static int note_weights(Seen *seen, PyObject *attributes, PyObject *names, PyObject **weights,
                        i64 *pointers)
{
    int found = 0;
    Tensor tensor = {0};
    PyObject *by_name = found_in(seen, attributes, parameters);
    PyObject *in_order = found_in(seen, attributes, flat_weights);
    const Py_ssize_t count = by_name ? PySequence_Size(names) : 0;
    /* A cell has no such list. */
    const int is_layer = is_a(names, &PyList_Type);
    note(seen, count);
    if (count < 0)
        own(seen, NULL);
    if (!by_name || count > MOST_WEIGHTS * MOST_LAYERS
        || (is_layer && (!in_order || PySequence_Size(in_order) != count)))
        seen->usual = 0;
    for (Py_ssize_t i = 0; i < count && seen->usual; i++) {
        PyObject *name = PySequence_GetItem(names, i);
        PyObject *weight = name ? found_in(seen, by_name, name) : NULL;
        PyObject *shadow = name ? found_in(seen, attributes, name) : NULL;
        PyObject *same = is_layer ? PySequence_GetItem(in_order, i) : NULL;
        const int is_other = is_layer && same != weight;
        if (same)
            Py_DecRef(same);
        else if (is_layer)
            own(seen, NULL);
        if (weight)
            Py_IncRef(weight);
        weight = own(seen, weight);
        if (name)
            Py_DecRef(name);
        if (shadow || is_other) {
            seen->usual = 0;
        } else if (weight == &_Py_NoneStruct) {
            note(seen, -1);
        } else if (weight) {
            note_tensor(seen, weight, 64, 0, &tensor);
            weights[found] = weight;
            pointers[found++] = (i64)(intptr_t)tensor.data;
        }
    }
    return found;
}

/* A packed batch. Facts are how many steps and sequences there are, and how many rows a step has on
   average, which is what decisions depend on; the sizes themselves every call has its own. */
static void note_packed(Seen *seen, PyObject *given, Tensor *input)
{
    Packed *packed = &seen->packed;
    Tensor sizes = {0};
    packed->data = own(seen, PySequence_GetItem(given, 0));
    packed->batch_sizes = own(seen, PySequence_GetItem(given, 1));
    packed->sorted = own(seen, PySequence_GetItem(given, 2));
    packed->unsorted = own(seen, PySequence_GetItem(given, 3));
    if (!seen->usual)
        return;
    note_tensor(seen, packed->data, 1, 1, input);
    if (!is_a(packed->batch_sizes, tensor_type) || !look_at(packed->batch_sizes, 1, &sizes)
        || sizes.dimensions != 1 || sizes.shape[0] == 0 || sizes.dtype.code != INTEGER
        || sizes.dtype.bits != 64 || sizes.device.type != CPU) {
        seen->usual = 0;
        return;
    }
    const i64 *of = sizes.data, steps = sizes.shape[0];
    i64 rows = of[0];
    for (i64 t = 1; t < steps; t++) {
        if (of[t] > of[t - 1])
            seen->usual = 0;
        rows += of[t];
    }
    if (!seen->usual || of[steps - 1] < 1 || rows != input->shape[0]) {
        seen->usual = 0;
        return;
    }
    packed->sizes = of[steps - 1] == of[0] ? NULL : of;
    note(seen, -5);
    note(seen, steps);
    note(seen, of[0]);
    note(seen, rows / steps);
}

static void note_states(Seen *seen, PyObject *hx, Tensor *h_0, Tensor *c_0)
{
    const int pair = is_a(hx, &PyTuple_Type) || is_a(hx, &PyList_Type);
    h_0->data = c_0->data = NULL;
    note(seen, hx == &_Py_NoneStruct ? -2 : pair ? -3 : -4);
    if (pair && PySequence_Size(hx) == 2) {
        PyObject *h = own(seen, PySequence_GetItem(hx, 0)), *c = own(seen, PySequence_GetItem(hx, 1));
        note_tensor(seen, h, 64, 0, h_0);
        note_tensor(seen, c, 64, 0, c_0);
        seen->states[0] = h, seen->states[1] = c;
    } else if (pair) {
        seen->usual = 0;
    } else if (hx != &_Py_NoneStruct) {
        note_tensor(seen, hx, 64, 0, h_0);
        seen->states[0] = hx;
    }
}

static void note_answer(Seen *seen, PyObject *asked)
{
    PyObject *answer = own(seen, PyObject_CallNoArgs(asked));
    if (answer)
        note_value(seen, answer);
}
static void note_switches(Seen *seen, const Tensor *input)
{
    for (Py_ssize_t i = 0; i < switch_count && seen->usual; i++)
        note_answer(seen, switches[i]);
    if (seen->usual && input->device.type != CPU && input->dtype.code == FLOATING
        && input->dtype.bits == 32)
        note_answer(seen, float32_switch);
}

/* Whether something is at work that sends all calls the other way. */
static int is_disturbed(Seen *seen)
{
    for (Py_ssize_t i = 0; i < question_count; i++) {
        PyObject *answer = own(seen, PyObject_CallNoArgs(questions[i]));
        if (!answer || is_true(answer))
            return 1;
    }
    return 0;
}

/* A new tensor of up to three dimensions, of the input's type; sizes of 0 are not there. */
static PyObject *empty(Seen *seen, i64 a, i64 b, i64 c, i64 *pointer)
{
    const i64 sizes[] = {a, b, c};
    PyObject *numbers[4] = {NULL};
    int count = 0;
    for (int i = 0; i < 3; i++)
        if (sizes[i])
            numbers[count++] = own(seen, PyLong_FromLongLong(sizes[i]));
    PyObject *made = NULL;
    if (seen->usual)
        made = own(seen, PyObject_CallMethodObjArgs(seen->input, new_empty, numbers[0], numbers[1],
                                                    numbers[2], NULL));
    Tensor tensor;
    if (!made || !look_at(made, 64, &tensor)) {
        seen->usual = 0;
        return NULL;
    }
    *pointer = (i64)(intptr_t)tensor.data;
    return made;
}

/* A state (.., N, ..) with its sequences in another order; as it is, where there is no other. */
static PyObject *in_order(Seen *seen, PyObject *state, PyObject *order)
{
    if (!state || !order || order == &_Py_NoneStruct)
        return state;
    PyObject *one = own(seen, PyLong_FromLong(1));
    return one ? own(seen, PyObject_CallMethodObjArgs(state, index_select, one, order, NULL)) : NULL;
}
static void sort_state(Seen *seen, PyObject *state, Tensor *tensor)
{
    PyObject *sorted = in_order(seen, state, seen->packed.sorted);
    if (sorted && sorted != state && !look_at(sorted, 64, tensor))
        seen->usual = 0;
}

/* What a packed call returns for its output. */
static PyObject *packed_output(Seen *seen, PyObject *rows)
{
    const Packed *packed = &seen->packed;
    if (!rows)
        return NULL;
    PyObject *fields = own(seen, PyTuple_Pack(4, rows, packed->batch_sizes, packed->sorted,
                                              packed->unsorted));
    return fields ? own(seen, PyObject_CallFunctionObjArgs(make_packed, fields, NULL)) : NULL;
}

/* Does a call: its results, or nothing; then it was not done, unless there is an error set. */
static PyObject *run(Seen *seen, const char *record, const Tensor *x, const i64 *weights, int count,
                     Tensor *h_0, Tensor *c_0)
{
    Known known;
    memcpy(&known, record, sizeof known);
    if (count != known.layers * known.weights)
        return NULL;
    const i64 T = known.seq_len, N = known.batch, D = known.directions, bytes = x->dtype.bits / 8;
    const int is_cell = known.form >= CELL;
    const int unbatched = known.form == UNBATCHED || known.form == UNBATCHED_CELL;
    const int is_packed = known.form == PACKED;
    /* The state of a cell is its output, and no tensor of its own. */
    const i64 state_rows = is_cell ? 0 : known.layers * D, state_batch = unbatched ? 0 : N;
    i64 outputs[MOST_LAYERS], h_n = 0, c_n = 0;
    PyObject *output = NULL, *h = NULL, *c = NULL;
    sort_state(seen, seen->states[0], h_0);
    sort_state(seen, seen->states[1], c_0);
    for (i64 layer = 0; layer < known.layers && seen->usual; layer++)
        output = is_packed
                     ? empty(seen, x->shape[0], 0, known.width, &outputs[layer])
                     : empty(seen, is_cell ? 0 : T, state_batch, known.width, &outputs[layer]);
    if (!is_cell && seen->usual)
        h = empty(seen, state_rows, state_batch, known.h_width, &h_n);
    if (known.c_width && seen->usual)
        c = empty(seen, state_rows, state_batch, known.c_width, &c_n);
    if (!seen->usual)
        return NULL;

    /* From a step to the next, which rows with batch sizes do without, and from a row to the next. */
    i64 step = x->strides[0], row = step;
    if (known.form == PADDED)
        row = x->strides[1];
    if (known.form == BATCH_FIRST)
        step = x->strides[1];
    /* So that rows lie in order if they can. */
    step = T == 1 || is_packed ? N * row : step;
    row = N == 1 && !is_packed ? step : row;
    i64 from = (i64)(intptr_t)x->data, failed = 0;
    void *state = PyEval_SaveThread();
    for (i64 i = 0; i < known.layers && !failed; i++) {
        Layer layer;
        memcpy(&layer, record + sizeof known + (size_t)i * sizeof layer, sizeof layer);
        i64 fields[SHARED + OWN + BACKWARD] = {0}, *own_fields = fields + SHARED;
        const i64 h_bytes = i * D * N * known.h_width * bytes;
        const i64 c_bytes = i * D * N * known.c_width * bytes;
        memcpy(fields, layer.shared, sizeof layer.shared);
        own_fields[0] = (i64)(intptr_t)seen->packed.sizes;
        own_fields[1] = from;
        own_fields[2] = seen->packed.sizes ? 0 : step;
        own_fields[3] = row;
        own_fields[4] = h_0->data ? (i64)(intptr_t)h_0->data + h_bytes : 0;
        own_fields[5] = c_0->data ? (i64)(intptr_t)c_0->data + c_bytes : 0;
        for (int place = 0; place < MOST_WEIGHTS; place++)
            if (layer.slots[place] < known.weights)
                own_fields[6 + place] = weights[i * known.weights + layer.slots[place]];
        own_fields[16] = outputs[i];
        own_fields[17] = h ? h_n + h_bytes : 0;
        own_fields[18] = c ? c_n + c_bytes : 0;
        memcpy(own_fields + 20, layer.team, sizeof layer.team);
        failed = ((i64(*)(const void *))(intptr_t)layer.address)(fields);
        from = outputs[i];
        step = N * known.width;
        row = known.width;
    }
    PyEval_RestoreThread(state);
    if (failed) {
        PyErr_SetString(PyExc_MemoryError,
                        "triton_rnn: no memory for the buffers of a recurrent layer");
        return NULL;
    }
    if (is_cell)
        return c ? PyTuple_Pack(2, output, c) : PyTuple_Pack(1, output);
    if (known.form == BATCH_FIRST) {
        PyObject *zero = own(seen, PyLong_FromLong(0)), *one = own(seen, PyLong_FromLong(1));
        output = own(seen, PyObject_CallMethodObjArgs(output, transpose, zero, one, NULL));
    }
    if (is_packed) {
        output = packed_output(seen, output);
        h = in_order(seen, h, seen->packed.unsorted);
        c = in_order(seen, c, seen->packed.unsorted);
        if (!seen->usual)
            return NULL;
    }
    PyObject *states = c ? own(seen, PyTuple_Pack(2, h, c)) : h;
    return output && states ? PyTuple_Pack(2, output, states) : NULL;
}

/* What Python is told: the weights, and then what it has decided. */
static PyObject *told(PyObject *const *weights, int count, PyObject *decided)
{
    PyObject *list = PyList_New(count + 1);
    for (int i = 0; list && i <= count; i++) {
        PyObject *item = i < count ? weights[i] : decided;
        Py_IncRef(item);
        PyList_SetItem(list, i, item);
    }
    return list;
}

/* All facts of a call, while it is usual; how many weights there are. */
static int gather(Seen *seen, PyObject *const *arguments, PyObject **weights, i64 *pointers,
                  Tensor *input, Tensor *h_0, Tensor *c_0)
{
    PyObject *module = arguments[0], *deciding = arguments[5];
    if (is_disturbed(seen)) {
        seen->usual = 0;
        return 0;
    }
    PyObject *has_grad = own(seen, PyObject_CallNoArgs(is_grad_enabled));
    if (!has_grad)
        return 0;
    seen->has_grad = is_true(has_grad);
    PyObject *attributes = own(seen, PyObject_GetAttr(module, dictionary));
    const int found = note_weights(seen, attributes, arguments[6], weights, pointers);
    seen->input = arguments[1];
    if (is_a(arguments[1], packed_type)) {
        note_packed(seen, arguments[1], input);
        seen->input = seen->packed.data;
    } else {
        note_tensor(seen, arguments[1], 1, 0, input);
    }
    if (seen->usual)
        note_states(seen, arguments[2], h_0, c_0);
    note_value(seen, arguments[3]);
    note_value(seen, arguments[4]);
    const Py_ssize_t many = PySequence_Size(deciding);
    for (Py_ssize_t i = 0; i < many && seen->usual; i++) {
        PyObject *name = own(seen, PySequence_GetItem(deciding, i));
        PyObject *value = name ? found_in(seen, attributes, name) : NULL;
        if (name && !value)
            value = own(seen, PyObject_GetAttr(module, name));
        if (value)
            note_value(seen, value);
    }
    note_switches(seen, input);
    note(seen, seen->needs_grad);
    return found;
}

/* In this order: the module, its input, its state or None; the backend that is asked for; what kind
   of module it is; the names of its attributes that matter, those of its weights. Returns the
   results, a tuple, where the call was done; where it is known what to do a list, see `told`, or
   False if it is not to be done here; bytes that the call is known by where nothing is known yet; or
   None where facts of this kind do not say it all. */
static PyObject *known(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    Seen seen;
    Tensor input = {0}, h_0 = {0}, c_0 = {0};
    PyObject *weights[MOST_WEIGHTS * MOST_LAYERS], *result = NULL;
    i64 pointers[MOST_WEIGHTS * MOST_LAYERS];
    int found = 0;
    (void)self;
    seen.fact_count = seen.owned_count = seen.needs_grad = 0;
    seen.states[0] = seen.states[1] = NULL;
    memset(&seen.packed, 0, sizeof seen.packed);
    seen.usual = count == 7;
    if (seen.usual)
        found = gather(&seen, arguments, weights, pointers, &input, &h_0, &c_0);
    PyObject *key = NULL, *record = NULL;
    if (seen.usual)
        key = own(&seen, PyBytes_FromStringAndSize((const char *)seen.facts,
                                                   seen.fact_count * (Py_ssize_t)sizeof(i64)));
    if (key)
        record = PyDict_GetItemWithError(known_calls, key);
    if (record) {
        Py_IncRef(record);
        own(&seen, record);
    }
    if (key && !record)
        Py_IncRef(result = key);
    else if (record && !is_a(record, &PyBytes_Type))
        result = told(weights, found, record);
    else if (record && PyBytes_Size(record) == 0)
        Py_IncRef(result = &_Py_FalseStruct);
    else if (record && seen.usual)
        result = run(&seen, PyBytes_AsString(record), &input, pointers, found, &h_0, &c_0);
    while (seen.owned_count)
        Py_DecRef(seen.owned[--seen.owned_count]);
    if (!result && !PyErr_Occurred())
        Py_IncRef(result = &_Py_NoneStruct);
    return result;
}

/* The functions of this file as Python's, `call` and `known`. Given are the exchange API's address;
   the types of plain tensors and of packed batches, and what makes the latter of their fields; what
   must answer no; what answers with a fact, and what with one for float32 that is not on the CPU;
   is_grad_enabled; and the dictionary of known calls. */
__attribute__((visibility("default"))) PyObject *
functions(const Exchange *given, PyObject *types, PyObject *asked, PyObject *facts,
          PyObject *float32_fact, PyObject *grad, PyObject *calls)
{
    static Definition definitions[] = {{"call", call, METH_FASTCALL, NULL},
                                       {"known", known, METH_FASTCALL, NULL}};
    exchange = given;
    tensor_type = PySequence_GetItem(types, 0);
    parameter_type = PySequence_GetItem(types, 1);
    packed_type = PySequence_GetItem(types, 2);
    make_packed = PySequence_GetItem(types, 3);
    for (question_count = 0; question_count < PySequence_Size(asked); question_count++)
        questions[question_count] = PySequence_GetItem(asked, question_count);
    for (switch_count = 0; switch_count < PySequence_Size(facts); switch_count++)
        switches[switch_count] = PySequence_GetItem(facts, switch_count);
    is_grad_enabled = grad, known_calls = calls, float32_switch = float32_fact;
    Py_IncRef(grad), Py_IncRef(calls), Py_IncRef(float32_fact);
    is_neg = PyUnicode_InternFromString("is_neg");
    new_empty = PyUnicode_InternFromString("new_empty");
    dictionary = PyUnicode_InternFromString("__dict__");
    parameters = PyUnicode_InternFromString("_parameters");
    flat_weights = PyUnicode_InternFromString("_flat_weights");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    transpose = PyUnicode_InternFromString("transpose");
    index_select = PyUnicode_InternFromString("index_select");
    PyObject *first = PyCFunction_NewEx(&definitions[0], NULL, NULL);
    PyObject *second = PyCFunction_NewEx(&definitions[1], NULL, NULL);
    return first && second ? PyTuple_Pack(2, first, second) : NULL;
}
