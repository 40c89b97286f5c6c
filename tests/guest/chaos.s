# A guest that does to its devices whatever comes to its mind, for ever: brings queues up properly
# and fills them with nonsense, writes and reads registers of any device at any width, and ports.
# Entered by PVH at its first byte: 32-bit protected mode, paging off, flat segments. The harness
# writes a seed into the first word behind the jump. A `.` on COM1 is 1024 deeds.
#
# Rings and what their descriptors point to lie in AREA; every fourth address or so is anything.

.set WINDOWS,   0xd0000000          # the virtio-mmio windows, 4 KiB each
.set WINDOW_COUNT, 19
.set AREA,      0x200000            # 1 MiB
.set COM1,      0x3f8

.section .chaos, "awx", @progbits
.code32
.global chaos_start
chaos_start:
    jmp start
    .balign 4
seed:
    .long 0x2545f491
deeds:
    .long 0
start:
    mov esp, 0x90000
    cld
next:
    inc dword ptr [deeds]
    test dword ptr [deeds], 1023
    jnz choose
    mov dx, COM1 + 3                # line and modem control, should it have played with them
    mov al, 3
    out dx, al
    inc dx
    mov al, 8
    out dx, al
    mov dx, COM1
    mov al, '.'
    out dx, al
choose:
    call random
    and eax, 15
    jmp [table + eax * 4]
    .balign 4
table:
    .long bring_up, bring_up, descriptors, descriptors, descriptors, available, available, notify
    .long notify, notify, write_any, write_any, read_any, ports, acknowledge, write_config

# xorshift32 (Marsaglia 2003): eax; ecx is lost.
random:
    mov eax, [seed]
    mov ecx, eax
    shl ecx, 13
    xor eax, ecx
    mov ecx, eax
    shr ecx, 17
    xor eax, ecx
    mov ecx, eax
    shl ecx, 5
    xor eax, ecx
    mov [seed], eax
    ret

# edi: some device's window.
window:
    call random
    xor edx, edx
    mov ecx, WINDOW_COUNT
    div ecx
    shl edx, 12
    lea edi, [edx + WINDOWS]
    ret

# eax: a page of AREA.
page:
    call random
    and eax, 0xff000
    add eax, AREA
    ret

# As a driver does it (virtio 1.2, 3.1.1), but for which features and where the rings are.
bring_up:
    call window
    xor eax, eax
    mov [edi + 0x70], eax           # status: reset, acknowledge, driver
    inc eax
    mov [edi + 0x70], eax
    mov al, 3
    mov [edi + 0x70], eax
    xor eax, eax
    mov [edi + 0x14], eax           # device features, low word
    mov ebx, [edi + 0x10]
    call random
    and ebx, eax
    xor eax, eax
    mov [edi + 0x24], eax           # driver features
    mov [edi + 0x20], ebx
    inc eax
    mov [edi + 0x24], eax
    mov [edi + 0x20], eax           # VERSION_1
    mov al, 11
    mov [edi + 0x70], eax
    xor esi, esi
one_queue:
    mov [edi + 0x30], esi           # which queue
    call random
    mov ecx, eax
    and ecx, 7
    mov eax, 1
    shl eax, cl
    mov [edi + 0x38], eax           # its size: 1 to 128
    xor ebx, ebx
    call page
    mov [edi + 0x80], eax
    mov [edi + 0x84], ebx
    call page
    mov [edi + 0x90], eax
    mov [edi + 0x94], ebx
    call page
    mov [edi + 0xa0], eax
    mov [edi + 0xa4], ebx
    mov eax, 1
    mov [edi + 0x44], eax           # ready
    inc esi
    cmp esi, 5
    jb one_queue
    mov eax, 15
    mov [edi + 0x70], eax           # driver ok
    jmp next

# A table of 32 descriptors somewhere in AREA: mostly plausible ones.
descriptors:
    call page
    mov edi, eax
    mov esi, 32
one_descriptor:
    call random
    mov ebx, eax
    and eax, 0x1fffff
    add eax, AREA                   # a device that writes over this program ends it
    test ebx, 0xf0000000
    jnz low_address
    mov eax, ebx
low_address:
    mov [edi], eax
    xor eax, eax
    test ebx, 0x0f000000
    jnz no_high_address
    mov eax, ebx
no_high_address:
    mov [edi + 4], eax
    call random
    mov edx, eax
    and eax, 0x1fff
    test edx, 0xe0000000
    jnz short_length
    mov eax, edx
short_length:
    mov [edi + 8], eax
    call random
    mov edx, eax
    and eax, 0x001f0003             # next, write; the next one within the table
    test edx, 0xf0000000
    jnz plain_flags
    mov eax, edx
plain_flags:
    mov [edi + 12], eax
    add edi, 16
    dec esi
    jnz one_descriptor
    jmp next

# An available ring somewhere in AREA: flags, index, 32 heads.
available:
    call page
    mov edi, eax
    call random
    and eax, 0x007f0001
    mov [edi], eax
    mov esi, 16
two_heads:
    add edi, 4
    call random
    and eax, 0x001f001f
    mov [edi], eax
    dec esi
    jnz two_heads
    jmp next

notify:
    call window
    call random
    and eax, 3
    mov [edi + 0x50], eax
    jmp next

# Any value, at any width, at any place of a window, the registers above all.
write_any:
    call window
    call random
    mov ebx, eax
    and ebx, 0xfff
    test eax, 0xc0000000
    jz anywhere
    and ebx, 0x1fc
anywhere:
    call random
    mov ecx, eax
    and ecx, 3
    jz write_byte
    dec ecx
    jz write_word
    mov [edi + ebx], eax
    jmp next
write_byte:
    mov [edi + ebx], al
    jmp next
write_word:
    mov [edi + ebx], ax
    jmp next

read_any:
    call window
    call random
    mov ebx, eax
    and ebx, 0xfff
    mov eax, [edi + ebx]
    mov al, [edi + ebx]
    jmp next

# The serial port's and the keyboard controller's registers, and some others; what would end the
# VM at once is rare enough as it is.
ports:
    call random
    mov edx, eax
    shr eax, 16
    and edx, 7
    test eax, 0x8000
    jz keyboard
    add edx, COM1
    out dx, al
    in al, dx
    jmp next
keyboard:
    test eax, 0x4000
    jz any_port
    or edx, 0x60
    in al, dx
    test dl, 4
    jnz next                        # the command register: reads only
    out dx, al
    jmp next
any_port:
    call random
    mov edx, eax
    and edx, 0xffff
    in eax, dx
    jmp next

acknowledge:
    call window
    mov eax, [edi + 0x60]
    mov [edi + 0x64], eax
    jmp next

write_config:
    call window
    call random
    mov ebx, eax
    and ebx, 0x3f
    call random
    mov [edi + ebx + 0x100], eax
    jmp next
