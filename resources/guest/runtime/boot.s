# The CPL 0 part of the guest, whole. It is linked at 1 MiB and fits below 1 MiB + 64 KiB, so that
# descriptors can be written as data: the low 16 bits of an address here are its distance from
# `boot_base`, the next 16 are 0x0010.
#
# Rules: no SSE, no loops, no table filled in at run time. On a KVM without hardware
# virtualisation each instruction below is interpreted, and what its emulator lacks
# (swapgs, sysret, int n, xsave) must not appear. CPL 3 is entered by iretq only, and left by
# interrupts and faults only.

.set KERNEL_CS, 0x08
.set KERNEL_SS, 0x10
.set USER_SS,   0x1b
.set USER_CS,   0x23
.set TSS_SEL,   0x28
.set HIGH_WORD, 0x0010
.set LAPIC,     0xfee00000

# The PVH note: the loader enters at the 32-bit address it holds, paging off, ebx = start info.
.section .note.pvh, "a", @note
    .long 4, 4, 18                  # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

.section .boot, "awx", @progbits
boot_base:
.code32
.global pvh_start
pvh_start:
    mov eax, 0x620                  # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER: LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80000033             # CR0: PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    mov esi, ebx
    xor edi, edi                    # first argument of user_start: 0 = PVH
    .byte 0xea                      # far jump into 64-bit code
    .long start_common
    .word KERNEL_CS

.code64
# The Linux 64-bit boot protocol: long mode, identity mapped, rsi = boot_params.
.global linux_start
linux_start:
    cli
    mov eax, 0x620
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    mov ecx, 0xc0000080             # EFER: LME, LMA
    xor edx, edx
    mov eax, 0x500
    wrmsr
    mov eax, 0x80000033
    mov cr0, rax
    lgdt [gdt_pointer]
    mov edi, 1

start_common:
    lidt [idt_pointer]
    mov eax, TSS_SEL
    ltr ax
    mov eax, LAPIC + 0x350          # LVT LINT0 masked: nothing comes from the 8259s
    mov dword ptr [rax], 0x10000
    # The bus clock in kHz where a hypervisor tells it. CPUID is asked for here since in CPL 3 the
    # answer may be the host's own.
    mov eax, 0x40000000
    cpuid
    cmp eax, 0x40000010
    jb 1f
    mov eax, 0x40000010
    cpuid
    mov [bus_khz], ebx
1:  mov rsp, offset kernel_stack_top
    push USER_SS
    push offset user_stack_top - 8
    push 0x202                      # IF
    push USER_CS
    push offset user_start
    iretq

# The way from CPL 3 into CPL 0 on request is the undefined instruction at `wait_request`: it asks to
# sleep until an interrupt has come since `irq_seen` was last cleared. (`syscall` would be the usual
# way, but a KVM without hardware virtualisation jumps to LSTAR and stays in CPL 3, where hlt faults.)
.global wait_request
wait_request:
    ud2
    ret

undefined_stub:
    cmp qword ptr [rsp], offset wait_request
    jne 1f
    add qword ptr [rsp], 2
    cmp dword ptr [irq_seen], 0
    jne 2f
    sti
    hlt
wait_over:                          # an interrupt that ends the hlt returns past here: see irq_common
    cli
2:  iretq
1:  push 0
    push 6
    jmp fault_common

# Interrupts: count, mark, end of interrupt, back. One that ended the wait's hlt returns straight to
# CPL 3, through the frame of the wait, at which the saved rsp points.
irq_common:
    push rax
    mov dword ptr [irq_seen], 1
    mov eax, LAPIC + 0xb0
    mov dword ptr [rax], 0
    pop rax
spurious:
    cmp qword ptr [rsp], offset wait_over
    je 1f
    iretq
1:  mov rsp, [rsp + 24]
    iretq

timer_stub:
    inc dword ptr [timer_ticks]
    jmp irq_common

.macro PIN_STUBS from, count
    .set pin, \from
    .rept \count
    .balign 16
    inc dword ptr [pin_counts + pin * 4]
    jmp irq_common
    .set pin, pin + 1
    .endr
.endm
.balign 16
pin_stubs:
    PIN_STUBS 0, 24

# Faults: the first is handed to CPL 3 with what is known about it; a second one resets the machine.
.macro FAULT_STUB vector, has_code
    .balign 16
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp fault_common
.endm
.balign 16
fault_stubs:
    .set vec, 0
    .rept 32
    .if vec == 8 || (vec >= 10 && vec <= 14) || vec == 17 || vec == 21 || vec == 29 || vec == 30
    FAULT_STUB vec, 1
    .else
    FAULT_STUB vec, 0
    .endif
    .set vec, vec + 1
    .endr

fault_common:
    cmp dword ptr [fault_taken], 0
    jne machine_reset
    mov dword ptr [fault_taken], 1
    pop rax
    mov [fault_record], rax         # vector
    pop rax
    mov [fault_record + 8], rax     # error code
    pop rax
    mov [fault_record + 16], rax    # rip
    pop rax
    mov [fault_record + 24], rax    # cs
    pop rax                         # rflags
    pop rax
    mov [fault_record + 32], rax    # rsp
    mov rax, cr2
    mov [fault_record + 40], rax
    mov rsp, offset kernel_stack_top
    push USER_SS
    push offset fault_stack_top - 8
    push 0x2                        # IF clear: nothing interrupts the report
    push USER_CS
    push offset user_fault
    iretq

machine_reset:
    mov al, 0xfe
    out 0x64, al
2:  cli
    hlt
    jmp 2b

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # KERNEL_CS
    .quad 0x00cf93000000ffff        # KERNEL_SS
    .quad 0x00cff3000000ffff        # USER_SS
    .quad 0x00affb000000ffff        # USER_CS
    .word tss_end - tss - 1         # TSS
    .word tss - boot_base
    .byte HIGH_WORD & 0xff, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

# The TSS with its I/O permission bitmap (a clear bit permits): 0x60, 0x64 and 0x3f8 to 0x3ff.
.balign 16
tss:
    .long 0
    .quad kernel_stack_top          # RSP0
    .fill 90, 1, 0
    .word iomap - tss
iomap:
    .fill 12, 1, 0xff
    .byte 0xee
    .fill 114, 1, 0xff
    .byte 0
    .byte 0xff
tss_end:

.macro GATE handler
    .word \handler - boot_base
    .word KERNEL_CS
    .byte 0, 0x8e
    .word HIGH_WORD
    .quad 0
.endm
.balign 16
idt:
    .set vec, 0
    .rept 32                        # 0x00: faults
    .if vec == 6
    GATE undefined_stub
    .else
    GATE fault_stubs+vec*16
    .endif
    .set vec, vec + 1
    .endr
    GATE timer_stub                 # 0x20: LAPIC timer
    .rept 15
    GATE spurious                   # 0x2f is the spurious vector; the rest is never programmed
    .endr
    .set vec, 0
    .rept 24                        # 0x30: IOAPIC pins 0 to 23
    GATE pin_stubs+vec*16
    .set vec, vec + 1
    .endr
idt_end:

# What CPL 0 and CPL 3 share.
.balign 64
.global irq_seen, timer_ticks, pin_counts, bus_khz, fault_record
irq_seen:       .long 0
timer_ticks:    .long 0
bus_khz:        .long 0
fault_taken:    .long 0
fault_record:   .fill 6, 8, 0
pin_counts:     .fill 24, 4, 0

.balign 16
    .fill 1024, 1, 0
kernel_stack_top:
    .fill 8192, 1, 0
fault_stack_top:

# Page tables: 4 GiB, identity, user-accessible, accessed and dirty already set. The first 2 MiB are
# mapped page by page, so that page 0 and the page below the CPL 3 stack can be absent.
.balign 4096
pml4:
    .quad pdpt + 0x67
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad pd + 0x67
    .quad pd + 0x1067
    .quad pd + 0x2067
    .quad pd + 0x3067
    .fill 508, 8, 0
pd:
    .quad pt + 0x67
    .set page, 1
    .rept 2047
    .quad page * 0x200000 + 0xe7
    .set page, page + 1
    .endr
pt:
    .set page, 0
    .rept 512
    .if page == 0 || page == 0x110
    .quad 0
    .else
    .quad page * 0x1000 + 0x67
    .endif
    .set page, page + 1
    .endr
boot_end:
