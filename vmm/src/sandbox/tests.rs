//! What a confined thread can and cannot do. A violation ends the process, so each test runs in a child of its own.

use std::io::Read;
use std::os::fd::AsRawFd;

use super::*;

/// Status of a child whose body panics.
const PANICKED: i32 = 101;

/// Runs `body` in a child process; returns its exit status and what it wrote to standard error.
fn in_child(body: impl FnOnce()) -> (i32, String) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child makes plain system calls and leaves with `_exit`; it takes no lock of the harness but the allocator's,
    // which glibc makes consistent after a fork.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: both descriptors are open; what follows never returns to the harness.
            unsafe { libc::dup2(writer.as_raw_fd(), libc::STDERR_FILENO) };
            // A test of the log, at the same time, may have left the number of a file that is now our pipe.
            report_to(-1);
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            let why =
                done.err().map(|why| why.downcast::<String>().map_or_else(|_| "?".to_owned(), |why| *why));
            if let Some(why) = &why {
                // What is printed goes to the harness, which is not here.
                // SAFETY: writes a buffer of this frame.
                unsafe { libc::write(libc::STDERR_FILENO, why.as_ptr().cast(), why.len()) };
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(why.map_or(0, |_| PANICKED)) }
        }
        child => {
            drop(writer);
            let mut text = String::new();
            std::fs::File::from(reader).read_to_string(&mut text).unwrap();
            let mut status = 0;
            // SAFETY: waits for the child just made.
            unsafe { libc::waitpid(child, &mut status, 0) };
            assert!(libc::WIFEXITED(status), "ended by signal {}: {text}", libc::WTERMSIG(status));
            (libc::WEXITSTATUS(status), text)
        }
    }
}

fn confined(needs: Needs) {
    confine(needs).unwrap();
    // One of the two: a thread is confined once.
    enter_main(needs).unwrap();
}

const NEEDS: Needs = Needs {
    seccomp: true,
    rotates_log: false,
    removes_names: false,
    talks: false,
    plugs_cpus: false,
    saves: false,
    rings: false,
    foreign_directory: false,
};

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    let (status, text) = in_child(|| {
        confined(NEEDS);
        // SAFETY: asks for a socket, if it may.
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    });
    assert_eq!(status, EXIT_CODE);
    assert_eq!(
        text,
        "flotilla-vmm: killed: system call 041 is not allowed by the sandbox (see -disable-seccomp)\n"
    );
}

#[test]
fn only_what_moves_data_has_rings() {
    for (rings, want) in [(false, EXIT_CODE), (true, 0)] {
        let (status, text) = in_child(|| {
            confine(Needs { rings, ..NEEDS }).unwrap();
            enter_worker().unwrap();
            // SAFETY: asks for a ring without entries, which there is not, if it may.
            unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, std::ptr::null::<u8>()) };
        });
        assert_eq!(status, want, "{text}");
    }
}

#[test]
fn code_cannot_be_mapped_and_unknown_requests_not_made() {
    let (status, _) = in_child(|| {
        confined(NEEDS);
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: maps fresh memory, if it may.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
    });
    assert_eq!(status, EXIT_CODE);
    let (status, _) = in_child(|| {
        confined(NEEDS);
        // SAFETY: pushes a byte into a terminal, if it may.
        unsafe { libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()) };
    });
    assert_eq!(status, EXIT_CODE);
}

#[test]
fn threads_start_and_end_below_the_filter_of_their_parent() {
    let (status, text) = in_child(|| {
        confine(NEEDS).unwrap();
        enter_worker().unwrap();
        let thread = std::thread::Builder::new().name("child".to_owned()).spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            vec![1u8; 1 << 22].len()
        });
        assert_eq!(thread.unwrap().join().unwrap(), 1 << 22);
    });
    assert_eq!((status, text.as_str()), (0, ""));
}

#[test]
fn no_capability_is_left() {
    let (status, text) = in_child(|| {
        confine(Needs::default()).unwrap();
        assert_eq!(rustix::thread::capabilities(None).unwrap().permitted, CapabilitySet::empty());
        assert!(rustix::thread::no_new_privs().unwrap());
    });
    assert_eq!((status, text.as_str()), (0, ""));
}

#[test]
fn a_worker_rotates_the_log_but_reads_nothing() {
    let needs = Needs { rotates_log: true, ..NEEDS };
    for (flags, want) in [(libc::O_RDONLY, EXIT_CODE), (libc::O_WRONLY | libc::O_APPEND, 0)] {
        let (status, _) = in_child(|| {
            confine(needs).unwrap();
            enter_worker().unwrap();
            // SAFETY: opens a device, if it may.
            unsafe { libc::open(c"/dev/null".as_ptr(), flags | libc::O_CLOEXEC) };
        });
        assert_eq!(status, want);
    }
}

#[test]
fn the_main_thread_opens_what_is_there_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (there, new) = (dir.path().join("there"), dir.path().join("new"));
    std::fs::write(&there, "x").unwrap();
    let path = |path: &std::path::Path| std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let (there, new) = (path(&there), path(&new));
    let removes = Needs { removes_names: true, ..NEEDS };
    // SAFETY: each opens or removes a file of this test, if it may.
    let attempt = |what: u8| unsafe {
        match what {
            0 => libc::open(there.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC),
            1 => libc::open(there.as_ptr(), libc::O_RDWR | libc::O_TRUNC),
            2 => libc::open(new.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o600),
            _ => libc::unlink(there.as_ptr()),
        }
    };
    for (needs, what, want) in
        [(NEEDS, 0, 0), (NEEDS, 1, EXIT_CODE), (NEEDS, 2, EXIT_CODE), (NEEDS, 3, EXIT_CODE), (removes, 3, 0)]
    {
        let (status, text) = in_child(|| {
            confined(needs);
            attempt(what);
        });
        assert_eq!(status, want, "{what}: {text}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
