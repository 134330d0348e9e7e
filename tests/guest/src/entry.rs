//! From the VMM's hands into ring 3: the entry points, the gates back into ring 0, and the tables that the processor reads.
//!
//! Nearly everything runs in ring 3, because some hosts emulate guest ring 0 one instruction at a time. The states:
//!
//! ```text
//! entry64 (Linux boot protocol, 64-bit) --+
//!                                         +--> ring 0, IF=0: page tables, GDT, TSS --iretq--> ring 3, IF=0: `guest_main`
//! entry32 (PVH) -- long mode -------------+                                                    |  ^
//!                                     IDLE gate: sti; hlt -- interrupt: EOI ---------------iretq--+
//!                                     exception: saves the facts ----------iretq to `report_fault`
//!                                     (of an MSR that is not there: back to whoever asked)
//! ```
//!
//! Interrupts can only arrive inside the IDLE gate, which is why the interrupt handler may drop its frame and return for it.

use core::arch::global_asm;

/// Bytes of stack in each ring.
const STACK: usize = 32 * 1024;
/// Task state segment (Intel SDM vol. 3, 8.7) and its I/O permission bitmap: 65536 zero bits, all ports open to ring 3, which IOPL
/// alone would not do on hosts that ignore it.
const TSS_SIZE: usize = 104 + 8192 + 8;
/// IOPL 3, for processors that look at it first: an emulated host's does not believe a bitmap any more once its TSS is marked busy, as it is
/// in every vCPU that was saved and restored.
const RING3_FLAGS: u32 = 0x3002;

global_asm!(
    r#"
/* A carriage return: no VMM's log line has one, so a benchmark can tell our byte, and a person does not see it. */
.macro FIRST_BYTE
    mov edx, 0x3f8
    mov al, 13
    out dx, al
.endm
/* The first 2 MiB (what the VMM wrote for us) and the image's own; paging.rs maps the rest. Present, writable, user; bit 7: 2 MiB page. */
.macro BUILD_TABLES
    mov dword ptr [boot_pml4], offset boot_pdpt + 7
    mov dword ptr [boot_pdpt], offset boot_pd + 7
    mov dword ptr [boot_pd], 0x87
    mov dword ptr [boot_pd + 8 * 8], 0x1000087
    mov eax, offset boot_pml4
    mov cr3, rax
.endm

.section .entry, "ax"
.code64
.globl entry64
entry64:
    FIRST_BYTE
    /* "hold..." as the command line: stop here, so that a benchmark sees the cost of getting here and nothing else. */
    mov ecx, [rsi + 0x228]
    cmp dword ptr [rcx], 0x646c6f68
    je hold
    mov [boot_argument], esi
    BUILD_TABLES
    /* PAE, OSFXSR, OSXMMEXCPT; PG, NE, ET, MP, PE */
    mov eax, 0x620
    mov cr4, rax
    mov eax, 0x80000033
    mov cr0, rax
to_ring3:
    mov esp, offset ring0_stack + {STACK}
    mov eax, offset tss
    mov [gdt_tss + 2], ax
    mov dword ptr [tss + 4], esp
    mov dword ptr [tss + 100], 104 << 16
    shr eax, 16
    mov [gdt_tss + 4], al
    mov [gdt_tss + 7], ah
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov eax, 0x28
    ltr ax
    push 0x23
    push offset ring3_stack + {STACK} - 8
    push {RING3_FLAGS}
    push 0x1b
    push offset guest_main
    mov edi, [boot_argument]
    mov esi, [boot_by_pvh]
    iretq

.code32
entry32:
    FIRST_BYTE
    mov ecx, [ebx + 24]
    cmp dword ptr [ecx], 0x646c6f68
    je hold32
    mov [boot_argument], ebx
    mov dword ptr [boot_by_pvh], 1
    mov dword ptr [boot_pml4], offset boot_pdpt + 7
    mov dword ptr [boot_pdpt], offset boot_pd + 7
    mov dword ptr [boot_pd], 0x87
    mov dword ptr [boot_pd + 8 * 8], 0x1000087
    mov eax, offset boot_pml4
    mov cr3, eax
    mov eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    lgdt [gdt_pointer]
    /* Far jump into the 64-bit code segment, spelt out: assemblers differ on its Intel syntax. */
    .byte 0xea
    .long to_ring3
    .word 0x08
hold32:
    cli
    hlt
    jmp hold32
.code64

/* Ring 3 calls `enter_gate`, with the gate's number in rax; it takes rax, rcx and rdx. An undefined instruction at one known place,
   because hosts that emulate ring 0 do not know `int`, and do not leave ring 3 on `syscall`. */
.globl enter_gate, gate
enter_gate:
    ud2
after_gate:
    ret
gate:
    cmp dword ptr [rsp], offset enter_gate
    jne exceptions + 6 * 16
    mov dword ptr [rsp], offset after_gate
    jmp [gates + rax * 8]
gate_idle:
    sti
    hlt
    cli
    iretq
/* Both answer in rcx whether the processor refused. */
gate_wrmsr:
    mov ecx, r8d
    mov eax, r9d
    mov edx, r10d
wrmsr_here:
    wrmsr
    xor ecx, ecx
    iretq
gate_rdmsr:
    mov ecx, r8d
rdmsr_here:
    rdmsr
    xor ecx, ecx
    iretq
refused:
    /* The frame that the exception pushed has the stack pointer of before: that of the gate's frame. */
    mov rsp, [rsp + 40]
    mov ecx, 1
    iretq
gate_xcr0:
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, r8d
    xsetbv
    iretq
gate_read_special:
    mov rax, cr0
    mov [special], rax
    mov rax, cr2
    mov [special + 8], rax
    mov rax, cr3
    mov [special + 16], rax
    mov rax, cr4
    mov [special + 24], rax
    mov rax, cr8
    mov [special + 32], rax
    mov rax, dr0
    mov [special + 40], rax
    mov rax, dr1
    mov [special + 48], rax
    mov rax, dr2
    mov [special + 56], rax
    mov rax, dr3
    mov [special + 64], rax
    mov rax, dr6
    mov [special + 72], rax
    mov rax, dr7
    mov [special + 80], rax
    iretq
gate_write_special:
    mov rax, [special + 8]
    mov cr2, rax
    mov rax, [special + 40]
    mov dr0, rax
    mov rax, [special + 48]
    mov dr1, rax
    mov rax, [special + 56]
    mov dr2, rax
    mov rax, [special + 64]
    mov dr3, rax
    mov rax, [special + 72]
    mov dr6, rax
    mov rax, [special + 80]
    mov dr7, rax
    iretq
gate_flush:
    mov rax, cr3
    mov cr3, rax
    iretq
hold:
    cli
    hlt
    jmp hold
gate_fault:
    lidt [empty_pointer]
    ud2

.globl interrupt, spurious
interrupt:
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
spurious:
    /* The frame of the gate, not 40 bytes up: the processor aligned the stack before it pushed ours. */
    mov esp, offset ring0_stack + {STACK} - 40
    iretq

/* Exceptions. Vectors 8, 10-14, 17, 21, 29 and 30 push an error code (Intel SDM vol. 3, 6.15); the others get a zero. 16 bytes each. */
.globl exceptions
.balign 16
exceptions:
.set vector, 0
.rept 32
    .balign 16
    .if ((0x60227d00 >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr
exception:
    cmp qword ptr [rsp + 16], offset wrmsr_here
    je refused
    cmp qword ptr [rsp + 16], offset rdmsr_here
    je refused
    pop qword ptr [fault_facts]
    pop qword ptr [fault_facts + 8]
    pop qword ptr [fault_facts + 16]
    mov rax, cr2
    mov [fault_facts + 24], rax
    mov esp, offset ring0_stack + {STACK}
    push 0x23
    push offset ring3_stack + {STACK} - 8
    push {RING3_FLAGS}
    push 0x1b
    push offset report_fault
    iretq

.section .data
.balign 8
gates:
    .quad gate_idle, gate_wrmsr, gate_flush, hold, gate_fault
    .quad gate_rdmsr, gate_xcr0, gate_read_special, gate_write_special
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00affb000000ffff
    .quad 0x00cff3000000ffff
gdt_tss:
    .quad 0x0000890000000000 + {TSS_SIZE} - 1
    .quad 0
gdt_pointer:
    .word 7 * 8 - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
empty_pointer:
    .word 0
    .quad 0

.section .note.Xen, "a", @note
    .long 4, 8, 18
    .asciz "Xen"
    .quad entry32

.section .bss
.balign 4096
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4096
.globl idt, boot_pdpt, fault_facts, special
idt: .skip 256 * 16
ring0_stack: .skip {STACK}
ring3_stack: .skip {STACK}
tss: .skip {TSS_SIZE}
.balign 8
boot_argument: .skip 8
boot_by_pvh: .skip 8
fault_facts: .skip 32
special: .skip 88
.section .text
"#,
    STACK = const STACK,
    TSS_SIZE = const TSS_SIZE,
    RING3_FLAGS = const RING3_FLAGS,
);
