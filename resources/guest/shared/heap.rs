//! A bounded heap: free blocks in one list, ordered by address, first fit, neighbours merged.
//! Made for a program with few, often large blocks. Blocks of a page and more are zeroed when they
//! are freed, so that memory nobody needs any more is a zero page to whoever copies the machine.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

const GRAIN: usize = 16;
const ZERO_FROM: usize = 4096;

/// Lives at the start of each free block.
struct Free {
    size: usize,
    next: *mut Free,
}

/// The heap of a program that has one thread and whose interrupt handlers never allocate.
pub struct Heap(UnsafeCell<State>);

struct State {
    head: *mut Free,
    used: usize,
    total: usize,
}

// SAFETY: a guest program runs on one vCPU, and its interrupt handlers (boot.s) touch no heap.
unsafe impl Sync for Heap {}

fn round(value: usize, to: usize) -> Option<usize> {
    value.checked_add(to - 1).map(|v| v & !(to - 1))
}

impl Heap {
    /// A heap with no memory: every allocation fails until `add` was called.
    pub const fn new() -> Heap {
        Heap(UnsafeCell::new(State {
            head: null_mut(),
            used: 0,
            total: 0,
        }))
    }

    /// Gives the range to the heap.
    ///
    /// # Safety
    /// The range is memory that nothing else uses from now on.
    pub unsafe fn add(&self, start: usize, end: usize) {
        let (Some(start), end) = (round(start, GRAIN), end & !(GRAIN - 1)) else {
            return;
        };
        if end > start + GRAIN {
            // SAFETY: single thread (see Sync); the range is ours by the caller's promise.
            unsafe {
                let state = &mut *self.0.get();
                state.total += end - start;
                state.insert(start, end - start);
            }
        }
    }

    /// Bytes in use and bytes in all.
    pub fn usage(&self) -> (usize, usize) {
        // SAFETY: single thread (see Sync).
        let state = unsafe { &*self.0.get() };
        (state.used, state.total)
    }
}

impl State {
    /// # Safety
    /// The range is free memory of this heap and not in the list.
    unsafe fn insert(&mut self, start: usize, size: usize) {
        let block = start as *mut Free;
        let mut before: *mut Free = null_mut();
        let mut after = self.head;
        // SAFETY: every pointer in the list is a free block with a valid header.
        unsafe {
            while !after.is_null() && (after as usize) < start {
                before = after;
                after = (*after).next;
            }
            block.write(Free { size, next: after });
            if !after.is_null() && start + size == after as usize {
                (*block).size += (*after).size;
                (*block).next = (*after).next;
                after.write(Free {
                    size: 0,
                    next: null_mut(),
                });
            }
            if before.is_null() {
                self.head = block;
            } else if before as usize + (*before).size == start {
                (*before).size += (*block).size;
                (*before).next = (*block).next;
                block.write(Free {
                    size: 0,
                    next: null_mut(),
                });
            } else {
                (*before).next = block;
            }
        }
    }
}

// SAFETY: `alloc` hands out ranges that it took from the free list, `dealloc` puts them back; both
// round sizes the same way, so ranges never overlap.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let align = layout.align().max(GRAIN);
        let Some(size) = round(layout.size().max(GRAIN), GRAIN) else {
            return null_mut();
        };
        // SAFETY: single thread; list pointers are valid free blocks.
        unsafe {
            let state = &mut *self.0.get();
            let mut link: *mut *mut Free = &mut state.head;
            while !(*link).is_null() {
                let block = *link;
                let (begin, end) = (block as usize, block as usize + (*block).size);
                if let Some(start) = round(begin, align)
                    && start.checked_add(size).is_some_and(|last| last <= end)
                {
                    let mut next = (*block).next;
                    if end > start + size {
                        let tail = (start + size) as *mut Free;
                        tail.write(Free {
                            size: end - start - size,
                            next,
                        });
                        next = tail;
                    }
                    if start > begin {
                        block.write(Free {
                            size: start - begin,
                            next,
                        });
                    } else {
                        *link = next;
                    }
                    state.used += size;
                    return start as *mut u8;
                }
                link = &mut (*block).next;
            }
        }
        null_mut()
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let size = (layout.size().max(GRAIN) + GRAIN - 1) & !(GRAIN - 1);
        // SAFETY: the block came from `alloc` with this layout, so it is `size` bytes of our memory.
        unsafe {
            if size >= ZERO_FROM {
                ptr.write_bytes(0, size);
            }
            let state = &mut *self.0.get();
            state.used -= size;
            state.insert(ptr as usize, size);
        }
    }
}
