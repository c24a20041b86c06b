// Entry from GRUB (Multiboot 1): 32-bit mode, no paging. Turns on 64-bit mode with the first 4 GiB
// mapped one to one, and every vector and tile register, then calls kernel_main(info).
        .set MAGIC, 0x1badb002
        .set FLAGS, 3                   // page-aligned modules, memory map
        .section .multiboot, "a"
        .align 4
        .long MAGIC, FLAGS, -(MAGIC + FLAGS)

        .text
        .code32
        .globl start
start:
        cli
        mov $stack_top, %esp
        mov %ebx, %esi                  // the Multiboot information
        // Page tables: 2 MiB pages.
        mov $page_directory, %edi
        mov $0x83, %eax                 // present, writable, large
        mov $2048, %ecx
1:      mov %eax, (%edi)
        movl $0, 4(%edi)
        add $0x200000, %eax
        add $8, %edi
        loop 1b
        mov $page_directory + 3, %eax
        mov $page_pointers, %edi
        mov $4, %ecx
2:      mov %eax, (%edi)
        movl $0, 4(%edi)
        add $4096, %eax
        add $8, %edi
        loop 2b
        movl $page_pointers + 3, page_root
        mov $page_root, %eax
        mov %eax, %cr3
        mov $0x40620, %eax              // CR4: PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        mov %eax, %cr4
        mov $0xc0000080, %ecx           // EFER: LME, SCE
        rdmsr
        or $0x101, %eax
        wrmsr
        mov $0x80000033, %eax           // CR0: PG, NE, ET, MP, PE
        mov %eax, %cr0
        lgdt gdt_pointer
        ljmp $8, $long_mode

        .code64
long_mode:
        mov $16, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        xor %eax, %eax
        mov %eax, %fs
        mov %eax, %gs
        // XCR0: all that this CPU has of x87, SSE, AVX, AVX-512 and AMX.
        mov $0xd, %eax
        xor %ecx, %ecx
        cpuid
        and $0x600e7, %eax
        xor %ecx, %ecx
        xor %edx, %edx
        xsetbv
        // syscall enters at syscall_entry, at the same privilege.
        mov $0xc0000081, %ecx           // STAR: code segment 8
        xor %eax, %eax
        mov $8, %edx
        wrmsr
        mov $0xc0000082, %ecx           // LSTAR
        mov $syscall_entry, %eax
        xor %edx, %edx
        wrmsr
        mov %esi, %edi
        call kernel_main

// The program's stack is used, below the red zone. Only rax, rcx and r11 change.
syscall_entry:
        lea -128(%rsp), %rsp
        push %rcx
        push %r11
        push %rdi
        push %rsi
        push %rdx
        push %r8
        push %r9
        push %r10
        push %rbx
        mov %rsp, %rbx
        and $-16, %rsp
        push %rax                       // number, then the arguments in order
        push %r9
        mov %r8, %r9
        mov %r10, %r8
        mov %rdx, %rcx
        mov %rsi, %rdx
        mov %rdi, %rsi
        mov %rax, %rdi
        cld
        call system_call                // (number, a, b, c, d, e, f on the stack)
        mov %rbx, %rsp
        pop %rbx
        pop %r10
        pop %r9
        pop %r8
        pop %rdx
        pop %rsi
        pop %rdi
        pop %r11
        pop %rcx
        lea 128(%rsp), %rsp
        jmp *%rcx

// run(entry, stack pointer)
        .globl run
run:
        mov %rsi, %rsp
        xor %edx, %edx
        xor %ebp, %ebp
        jmp *%rdi

// One stub for each exception vector: pushes an error code if the CPU does not, then the vector.
        .macro exception vector
        .align 16
        .if !(\vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17 || \vector == 21)
        push $0
        .endif
        push $\vector
        jmp exception_common
        .endm
        .align 16
        .globl exception_stubs
exception_stubs:
        .set i, 0
        .rept 32
        exception i
        .set i, i + 1
        .endr
exception_common:
        pop %rdi                        // vector
        pop %rsi                        // error code
        pop %rdx                        // rip
        and $-16, %rsp
        call exception_report

        .data
        .align 8
gdt:    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
        .word 23
        .quad gdt

        .bss
        .align 4096
page_root:      .skip 4096
page_pointers:  .skip 4096
page_directory: .skip 4 * 4096
                .skip 65536
stack_top:
        .section .note.GNU-stack, "", @progbits
