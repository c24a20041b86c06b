// Runs one static Linux program (x86-64 ELF, one thread) without an operating system: loads the
// program that GRUB put into memory as a module, and answers the few system calls that the C
// library, OpenMP with one thread and GoogleTest make. Output goes to the first serial port.
// Linux itself will not do: it gives programs the AMX tiles only where the CPU has XFD, which Bochs
// does not emulate.
#include <elf.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

enum {
  kPage = 4096,
  kStackSize = 8 << 20,
  kArchSetFs = 0x1002,
  kArchReqXcompPerm = 0x1023,
};

struct MultibootInfo {
  uint32_t flags, mem_lower, mem_upper_kib, boot_device, cmdline, mods_count, mods_addr;
};
struct MultibootModule {
  uint32_t begin, end, string, reserved;
};

void run(uint64_t entry, uint64_t* stack) __attribute__((noreturn));
extern char exception_stubs[];

// Anonymous memory: [heap_begin, heap_break) grows up, mappings grow down from the stack.
static uint64_t image, heap_begin, heap_break, mappings, top;
static uint64_t ticks;

static void out8(uint16_t port, uint8_t value) {
  __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static uint8_t in8(uint16_t port) {
  uint8_t value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static void put(const char* text, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) {
    while (!(in8(0x3fd) & 0x20)) {
    }
    out8(0x3f8, (uint8_t)text[i]);
  }
}
static void print(const char* text) {
  uint64_t size = 0;
  while (text[size]) ++size;
  put(text, size);
}
static void print_number(uint64_t value, unsigned base) {
  char digits[24];
  int i = 24;
  do digits[--i] = "0123456789abcdef"[value % base];
  while (value /= base);
  put(digits + i, 24 - i);
}
void* memcpy(void* dst, const void* src, size_t n) {
  void* result = dst;
  __asm__ volatile("rep movsb" : "+D"(dst), "+S"(src), "+c"(n)::"memory");
  return result;
}
void* memset(void* dst, int value, size_t n) {
  void* result = dst;
  __asm__ volatile("rep stosb" : "+D"(dst), "+c"(n) : "a"(value) : "memory");
  return result;
}

static __attribute__((noreturn)) void power_off(int status) {
  print("\nexit status ");
  print_number((uint64_t)status, 10);
  print("\n");
  while (!(in8(0x3fd) & 0x40)) {
  }
  for (;;)  // Bochs ends when it reads this word at this port.
    for (const char* s = "Shutdown"; *s; ++s) out8(0x8900, (uint8_t)*s);
}

void exception_report(uint64_t vector, uint64_t error, uint64_t rip) {
  uint64_t address;
  __asm__ volatile("mov %%cr2, %0" : "=r"(address));
  print("\nexception ");
  print_number(vector, 10);
  print(" error ");
  print_number(error, 16);
  print(" rip ");
  print_number(rip, 16);
  print(" cr2 ");
  print_number(address, 16);
  power_off(139);
}

// ------------------------------------------------------------------------------------------------
struct IoVec {
  const char* base;
  uint64_t size;
};
static int64_t write_vector(const struct IoVec* v, uint64_t count) {
  int64_t total = 0;
  for (uint64_t i = 0; i < count; ++i) {
    put(v[i].base, v[i].size);
    total += (int64_t)v[i].size;
  }
  return total;
}

static int64_t set_break(uint64_t wanted) {
  if (wanted >= heap_begin && wanted < mappings) {
    if (wanted > heap_break) memset((void*)heap_break, 0, wanted - heap_break);
    heap_break = wanted;
  }
  return (int64_t)heap_break;
}

static int64_t map_memory(uint64_t size) {
  size = (size + kPage - 1) / kPage * kPage;
  if (size > mappings - heap_break) return -ENOMEM;
  mappings -= size;
  memset((void*)mappings, 0, size);
  return (int64_t)mappings;
}
static int64_t unmap_memory(uint64_t address, uint64_t size) {
  // Only the lowest mapping is given back.
  if (address == mappings) mappings += (size + kPage - 1) / kPage * kPage;
  return 0;
}

static int64_t arch_prctl(uint64_t code, uint64_t value) {
  if (code == kArchReqXcompPerm) return value == 18 ? 0 : -EINVAL;
  if (code != kArchSetFs) return -EINVAL;
  __asm__ volatile("wrmsr" ::"c"(0xc0000100), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
  return 0;
}

static int64_t tell_time(uint64_t* seconds_and_nanoseconds) {
  ++ticks;
  seconds_and_nanoseconds[0] = ticks / 1000;
  seconds_and_nanoseconds[1] = ticks % 1000 * 1000000;
  return 0;
}

static int64_t random_bytes(uint8_t* buffer, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) buffer[i] = (uint8_t)(i * 37 + 11);
  return (int64_t)size;
}

int64_t system_call(uint64_t number, uint64_t a, uint64_t b, uint64_t c) {
  switch (number) {
    case SYS_write:
      put((const char*)b, c);
      return (int64_t)c;
    case SYS_writev:
      return write_vector((const struct IoVec*)b, c);
    case SYS_brk:
      return set_break(a);
    case SYS_mmap:
      return map_memory(b);
    case SYS_munmap:
      return unmap_memory(a, b);
    case SYS_arch_prctl:
      return arch_prctl(a, b);
    case SYS_clock_gettime:
      return tell_time((uint64_t*)b);
    case SYS_gettimeofday:
      return tell_time((uint64_t*)a);
    case SYS_getrandom:
      return random_bytes((uint8_t*)a, b);
    case SYS_getcwd:
      memcpy((void*)a, "/", 2);
      return 2;
    case SYS_sched_getaffinity:
      memset((void*)c, 0, b);
      *(uint8_t*)c = 1;
      return 8;
    case SYS_set_tid_address:
    case SYS_getpid:
    case SYS_gettid:
      return 1;
    case SYS_exit:
    case SYS_exit_group:
      power_off((int)(a & 255));
    case SYS_tgkill:
    case SYS_kill:
      power_off(134);
    case SYS_mprotect:
    case SYS_madvise:
    case SYS_futex:
    case SYS_set_robust_list:
    case SYS_rt_sigaction:
    case SYS_rt_sigprocmask:
    case SYS_sched_yield:
    case SYS_clock_nanosleep:
    case SYS_close:
      return 0;
    default:  // files, threads, limits: the C library copes without
      return number == SYS_openat || number == SYS_readlinkat || number == SYS_newfstatat ? -ENOENT
                                                                                          : -ENOSYS;
  }
}

// ------------------------------------------------------------------------------------------------
static void catch_exceptions(void) {
  static uint64_t table[32][2];
  for (int i = 0; i < 32; ++i) {
    const uint64_t stub = (uint64_t)exception_stubs + 16 * (uint64_t)i;
    table[i][0] = (stub & 0xffff) | 8 << 16 | 0x8e00ull << 32 | (stub >> 16 & 0xffff) << 48;
    table[i][1] = stub >> 32;
  }
  struct {
    uint16_t limit;
    uint64_t base;
  } __attribute__((packed)) pointer = {sizeof(table) - 1, (uint64_t)table};
  __asm__ volatile("lidt %0" ::"m"(pointer));
}

// Copies the segments of a program linked to fixed addresses; heap_begin lies behind them.
static const Elf64_Ehdr* load_program(const uint8_t* file) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)file;
  if (header->e_ident[0] != 0x7f || header->e_type != ET_EXEC) {
    print("not a static program linked to fixed addresses (-static -no-pie)\n");
    power_off(126);
  }
  const Elf64_Phdr* segment = (const Elf64_Phdr*)(file + header->e_phoff);
  for (int i = 0; i < header->e_phnum; ++i, ++segment) {
    if (segment->p_type != PT_LOAD) continue;
    uint8_t* dst = (uint8_t*)segment->p_vaddr;
    if (segment->p_offset == 0) image = segment->p_vaddr;
    memcpy(dst, file + segment->p_offset, segment->p_filesz);
    memset(dst + segment->p_filesz, 0, segment->p_memsz - segment->p_filesz);
    const uint64_t end = segment->p_vaddr + segment->p_memsz;
    if (end > heap_begin) heap_begin = (end + kPage - 1) / kPage * kPage;
  }
  heap_break = heap_begin;
  return header;
}

// argc, argv, environment and auxiliary vector. `line` is cut into words in place: NAME=VALUE for
// the environment, then the program's name and arguments.
static uint64_t* make_stack(char* line, const Elf64_Ehdr* header) {
  static char threads[] = "OMP_NUM_THREADS=1";
  static uint64_t words[512], environment[64];
  uint64_t n = 1, variables = 0;
  environment[variables++] = (uint64_t)threads;
  for (char* p = line; *p;) {
    while (*p == ' ') *p++ = 0;
    char* word = p;
    int assignment = 0;
    while (*p && *p != ' ') assignment |= *p++ == '=';
    if (p == word) continue;
    if (assignment && n == 1)
      environment[variables++] = (uint64_t)word;
    else
      words[n++] = (uint64_t)word;
  }
  words[0] = n - 1;
  words[n++] = 0;
  for (uint64_t i = 0; i < variables; ++i) words[n++] = environment[i];
  words[n++] = 0;
  const uint64_t auxiliary[] = {AT_PHDR,        image + header->e_phoff,
                                AT_PHENT,       header->e_phentsize,
                                AT_PHNUM,       header->e_phnum,
                                AT_ENTRY,       header->e_entry,
                                AT_PAGESZ,      kPage,
                                AT_RANDOM,      (uint64_t)words,
                                AT_SECURE,      0,
                                AT_MINSIGSTKSZ, 16384,
                                AT_NULL,        0};
  memcpy(words + n, auxiliary, sizeof(auxiliary));
  uint64_t* stack = (uint64_t*)(top - sizeof(words) - 4096);
  memcpy(stack, words, sizeof(words));
  return stack;
}

void kernel_main(const struct MultibootInfo* info) {
  out8(0x3fb, 0x80);  // 115200 baud, 8 bits
  out8(0x3f8, 1);
  out8(0x3f9, 0);
  out8(0x3fb, 3);
  catch_exceptions();
  const struct MultibootModule* module = (const struct MultibootModule*)(uint64_t)info->mods_addr;
  // GRUB may have put the program where it wants to be loaded: move it to the top of memory.
  static char line[4096];
  const char* words = (const char*)(uint64_t)module->string;
  for (int i = 0; i < 4095 && words[i]; ++i) line[i] = words[i];
  const uint64_t size = module->end - module->begin;
  uint8_t* file = (uint8_t*)((0x100000 + 1024ull * info->mem_upper_kib - size) / kPage * kPage);
  memcpy(file, (const void*)(uint64_t)module->begin, size);
  top = (uint64_t)file;
  mappings = top - kStackSize;
  const Elf64_Ehdr* header = load_program(file);
  run(header->e_entry, make_stack(line, header));
}
