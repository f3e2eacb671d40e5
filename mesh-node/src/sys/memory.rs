//! Memory of this process that goes back to the kernel.

use std::io;

/// Free memory at the end of a thread's heap goes back to the kernel when it is more than this.
#[cfg(target_env = "gnu")]
const KEPT_FREE: libc::c_int = 256 << 10;
/// Larger requests are mappings of their own, which go back when they are freed.
#[cfg(target_env = "gnu")]
const OWN_MAPPING: libc::c_int = 1 << 20;

/// Keeps the C library (glibc) from holding ever more free memory at the ends of its heaps, which [`trim_heap`] does not
/// reach: by default both limits grow with the largest request that was ever freed. Call it before there are threads.
pub fn bound_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers; nobody else allocates meanwhile.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_FREE);
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING);
    }
}

/// Gives free pages of the heap back to the kernel, where the C library can (glibc).
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and locks the allocator's own structures.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Takes code and constants of programs and libraries out of this process's memory. What is used is mapped again from
/// the kernel's cache of the file by a short fault; what only the start needed stays away.
///
/// # Errors
/// `/proc` is not mounted.
pub fn unmap_code() -> io::Result<()> {
    for (start, length) in std::fs::read_to_string("/proc/self/maps")?.lines().filter_map(unwritten) {
        // SAFETY: the range is a mapping of a file that this process cannot write and has not written, so that its pages
        // are the file's; a page that is dropped is read from there again.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
    Ok(())
}

/// Start and length of a mapping whose pages are a file's: code, or the headers and constants at its beginning. What
/// the dynamic linker has written and then made read-only is neither.
fn unwritten(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let path = fields.nth(2)?;
    let is_code =
        permissions == "r-xp" || (permissions == "r--p" && offset.bytes().all(|digit| digit == b'0'));
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (is_code && path.starts_with('/')).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mappings_that_nobody_wrote_are_unmapped() {
        let maps = [
            ("1000-3000 r--p 00000000 fe:00 7 /usr/bin/mesh-node", Some((0x1000, 0x2000))),
            ("3000-4000 r-xp 00002000 fe:00 7 /usr/bin/mesh-node", Some((0x3000, 0x1000))),
            ("4000-5000 r--p 00003000 fe:00 7 /usr/bin/mesh-node", None),
            ("5000-6000 rw-p 00004000 fe:00 7 /usr/bin/mesh-node", None),
            ("6000-7000 rw-p 00000000 00:00 0 [heap]", None),
            ("7000-8000 r-xp 00000000 00:00 0 [vdso]", None),
            ("8000-9000 r--s 00000000 fe:00 9 /etc/shared", None),
            ("9000-a000 ---p 00000000 00:00 0", None),
        ];
        for (line, expected) in maps {
            assert_eq!(unwritten(line), expected, "{line}");
        }
    }

    #[test]
    fn a_program_goes_on_without_its_code_in_memory() {
        let before = b"constants";
        unmap_code().unwrap();
        assert_eq!(before, b"constants");
        trim_heap();
        assert!(std::thread::spawn(|| format!("{:?}", std::time::Instant::now())).join().unwrap().len() > 3);
    }
}
