/*
 * Loaded before the emulator's own libraries (LD_PRELOAD), by emulator.rs.
 *
 * A guest inside the host that writes CR8 while KVM there waits for it to take interrupts (V_IRQ) has QEMU's helper for that write raise an
 * interrupt without the lock which that needs, and QEMU ends itself: "tcg_handle_interrupt: assertion failed: (qemu_mutex_iothread_locked())"
 * (7.2; target/i386/tcg/sysemu/misc_helper.c, helper_write_crN). UEFI firmware restores CR8 at the end of each interrupt; Linux does not use it.
 *
 * The function is the TCG module's, which asks for it by its name: so it finds this one, which takes the lock first if need be. In an emulator
 * whose names are others, nothing calls this.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef void handle_interrupt(void *cpu, int mask);

static int find_module(struct dl_phdr_info *info, size_t size, void *name)
{
    (void)size;
    if (strstr(info->dlpi_name, "/accel-tcg-") == NULL)
        return 0;
    *(const char **)name = info->dlpi_name;
    return 1;
}

static handle_interrupt *modules_own(void)
{
    const char *name = NULL;
    dl_iterate_phdr(find_module, &name);
    void *module = name == NULL ? NULL : dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    return module == NULL ? NULL : (handle_interrupt *)dlsym(module, "tcg_handle_interrupt");
}

void tcg_handle_interrupt(void *cpu, int mask)
{
    /* The same for all threads, whichever comes first. */
    static handle_interrupt *own;
    static bool (*locked)(void);
    static void (*lock)(const char *file, int line);
    static void (*unlock)(void);
    if (own == NULL) {
        locked = (bool (*)(void))dlsym(RTLD_DEFAULT, "qemu_mutex_iothread_locked");
        lock = (void (*)(const char *, int))dlsym(RTLD_DEFAULT, "qemu_mutex_lock_iothread_impl");
        unlock = (void (*)(void))dlsym(RTLD_DEFAULT, "qemu_mutex_unlock_iothread");
        own = modules_own();
        if (own == NULL || locked == NULL || lock == NULL || unlock == NULL)
            abort();
    }
    bool held = locked();
    if (!held)
        lock(__FILE__, __LINE__);
    own(cpu, mask);
    if (!held)
        unlock();
}
