/* The memory that a call works in: one block, cut in pieces. */

/* Blocks of more than malloc keeps come from the system at every call and go back to it, and each of
   their pages costs a fault when it is first touched: huge ones are five hundred times fewer. */
enum { MALLOC_KEEPS = 32 << 20 };
static void in_huge_pages(const void *first, size_t bytes)
{
#if defined(MADV_HUGEPAGE)
    const size_t page = 4096;
    const size_t from = ((size_t)first + page - 1) & ~(page - 1);
    const size_t to = ((size_t)first + bytes) & ~(page - 1);
    if (bytes > MALLOC_KEEPS)
        /* Where it is refused, pages are small. */
        (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)first, (void)bytes;
#endif
}

/* A piece of a block of memory; counts first, hands out then. */
typedef struct {
    char *base;
    size_t used;
} Arena;
/* The block, of all that was counted; NULL where there is no memory. Its alignment is small: of
   blocks that are aligned to pages malloc keeps none. */
static char *block_for(const Arena *arena)
{
    char *block = aligned_alloc(VECTOR_BYTES, arena->used);
    if (block)
        in_huge_pages(block, arena->used);
    return block;
}
static void *take(Arena *arena, size_t bytes)
{
    size_t at = arena->used;
    /* A vector more, so that a whole vector may be read at any number. */
    arena->used += (bytes + 2 * VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
    return arena->base ? arena->base + at : NULL;
}
