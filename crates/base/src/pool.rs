//! A fork-join pool for short parallel sections: workers spin briefly for the next section, then
//! park, so that an idle program costs nothing and a busy machine is not fought over.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A section's body: called with the index of each task.
type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that run numbered tasks together and wait for each other.
///
/// [`Pool::run`] gives every thread a run of consecutive tasks, so that neighbours in memory are read by
/// one thread, one after the other. A thread that is done takes half of what another has left: a thread
/// that the system has descheduled holds back at most the task it is in. Which thread runs a task is not
/// determined; write tasks so that results depend on the index alone.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One section at a time; callers on other threads queue here.
    section: Mutex<()>,
}

struct Shared {
    /// Counts sections; spinning workers watch it change.
    epoch: AtomicUsize,
    state: Mutex<State>,
    /// What each thread has left of the current section, the caller's first.
    left: Box<[Left]>,
    /// Workers inside the current section. Raised only under the lock, while a job is posted.
    inside: AtomicUsize,
    panicked: AtomicBool,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    parked: usize,
    stop: bool,
}

/// Consecutive tasks that nobody has begun: the first and the one after the last, in the halves of one
/// word, on a cache line that no other thread's are on.
#[repr(align(128))]
struct Left(AtomicU64);

impl Left {
    fn set(&self, start: usize, end: usize) {
        self.0.store(Self::word(start, end), Ordering::Relaxed);
    }

    fn word(start: usize, end: usize) -> u64 {
        (start as u64) << 32 | end as u64
    }

    fn ends(word: u64) -> (usize, usize) {
        ((word >> 32) as usize, word as u32 as usize)
    }

    fn len(&self) -> usize {
        let (start, end) = Self::ends(self.0.load(Ordering::Relaxed));
        end - start
    }

    /// Takes the first task.
    fn first(&self) -> Option<usize> {
        self.take(|start, end| ((start, start + 1), (start + 1, end))).map(|(start, _)| start)
    }

    /// Takes the last half, rounded up.
    fn last_half(&self) -> Option<(usize, usize)> {
        self.take(|start, end| {
            let middle = start + (end - start) / 2;
            ((middle, end), (start, middle))
        })
    }

    /// Takes what `cut` says is taken, and leaves what it says is left.
    fn take(
        &self,
        cut: impl Fn(usize, usize) -> ((usize, usize), (usize, usize)),
    ) -> Option<(usize, usize)> {
        // A word says all there is to know, so that it does not matter whether it has been another one
        // in between.
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = Self::ends(word);
            if start == end {
                return None;
            }
            let (taken, (start, end)) = cut(start, end);
            let rest = Self::word(start, end);
            match self.0.compare_exchange_weak(word, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(newer) => word = newer,
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
}

// SAFETY: the pointer is dereferenced only while `Pool::run` keeps the body borrowed.
unsafe impl Send for Job {}

/// How long a worker spins before it parks: longer than the gap between two sections of a decode step
/// and far shorter than a scheduler's time slice.
const PATIENCE: Duration = Duration::from_micros(100);

/// Looks between two at the clock. How long one takes differs tenfold between processors.
const LOOKS: usize = 16;

/// Spins until `done` or patience ends. True where it is done.
fn spin(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() >= PATIENCE {
            return false;
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them. Zero means one for
    /// each processor this process may use.
    pub fn new(threads: usize) -> Self {
        let threads = if threads == 0 {
            std::thread::available_parallelism().map_or(1, |n| n.get())
        } else {
            threads
        };
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            state: Mutex::default(),
            left: (0..threads).map(|_| Left(AtomicU64::new(0))).collect(),
            inside: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("bevel-{i}"))
                    .spawn(move || shared.work(i))
                    .expect("the system refuses another thread")
            })
            .collect();
        Self { shared, workers, section: Mutex::new(()) }
    }

    /// Threads in the pool, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(i)` for each `i` in `0..tasks`, spread over the threads; returns when all are done.
    /// A `body` must not call `run` on the same pool.
    ///
    /// # Panics
    /// Where a task panicked, or `tasks` is 2³² or more.
    pub fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(body);
            return;
        }
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks in a section");
        let _section = lock(&self.section);
        let s = &*self.shared;
        let body: &Body<'_> = &body;
        // SAFETY: only the lifetime is erased. Every worker is past its last use of the pointer
        // before this function returns or unwinds: `Close` sees to it.
        let erased = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        {
            let mut state = lock(&s.state);
            state.job = Some(Job { body: erased });
            // Nobody is inside: the section before has closed.
            for (thread, left) in s.left.iter().enumerate() {
                let start = |thread: usize| tasks * thread / s.left.len();
                left.set(start(thread), start(thread + 1));
            }
            s.epoch.fetch_add(1, Ordering::Release);
            if state.parked > 0 {
                s.wake.notify_all();
            }
        }
        let close = Close(s);
        s.drain(body, 0);
        drop(close);
        assert!(!s.panicked.swap(false, Ordering::Relaxed), "a task of the thread pool panicked");
    }

    /// Splits `out` into consecutive chunks of `chunk` values and calls `body(index, chunk)` for each.
    pub fn run_chunks<T: Send>(
        &self,
        out: &mut [T],
        chunk: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, base) = (out.len(), SendPtr(out.as_mut_ptr()));
        self.run(len.div_ceil(chunk), |i| {
            let start = i * chunk;
            // SAFETY: chunks of different indices do not overlap and lie inside `out`, which this
            // call borrows mutably until every task is done.
            let part = unsafe {
                std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start))
            };
            body(i, part);
        });
    }
}

/// Ends a section, also when the caller's own task unwinds: no worker may enter any more, and those
/// inside are waited for. A worker that never woke up is not.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cancel();
        }
        lock(&self.0.state).job = None;
        let is_empty = || self.0.inside.load(Ordering::Acquire) == 0;
        if !spin(is_empty) {
            while !is_empty() {
                std::thread::yield_now();
            }
        }
    }
}

impl Shared {
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(job) = self.enter_section(&mut seen) {
            // SAFETY: `Close` waits for `inside` to reach zero before the body's borrow ends.
            let body = unsafe { &*job.body };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.drain(body, thread);
            }));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
                self.cancel();
            }
            self.inside.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a section and enters it; `None` when the pool closes.
    fn enter_section(&self, seen: &mut usize) -> Option<Job> {
        spin(|| self.epoch.load(Ordering::Acquire) != *seen);
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return None;
            }
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != *seen {
                *seen = epoch;
                if let Some(job) = state.job {
                    self.inside.fetch_add(1, Ordering::Relaxed);
                    return Some(job);
                }
            }
            state.parked += 1;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
    }

    fn drain(&self, body: &Body<'_>, thread: usize) {
        let own = &self.left[thread];
        loop {
            while let Some(task) = own.first() {
                body(task);
            }
            // Half of the most that another has left. Only its thread fills an empty word.
            let Some(richest) = self.left.iter().max_by_key(|left| left.len()) else { return };
            match richest.last_half() {
                Some((start, end)) => own.set(start, end),
                None if self.left.iter().all(|left| left.len() == 0) => return,
                None => {}
            }
        }
    }

    /// Leaves no task to begin. A thread that has just taken some from another may yet run these.
    fn cancel(&self) {
        self.left.iter().for_each(|left| left.set(0, 0));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            lock(&self.shared.state).stop = true;
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

struct SendPtr<T>(*mut T);
impl<T> SendPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}
// SAFETY: used only to form disjoint slices of `T: Send` (see `run_chunks`).
unsafe impl<T: Send> Sync for SendPtr<T> {}

/// A panic inside a section leaves no broken state behind, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let pool = Pool::new(3);
        let mut out = vec![0; 103];
        pool.run_chunks(&mut out, 10, |i, part| part.fill(i));
        assert!(out.iter().enumerate().all(|(j, &v)| v == j / 10));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(50, |i| assert!(i != 17, "expected in this test"));
        }));
        assert!(run.is_err());
        let hits = AtomicUsize::new(0);
        pool.run(50, |_| {
            hits.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(hits.into_inner(), 50);
    }

    #[test]
    fn sections_from_several_threads_queue_up() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        pool.run(7, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 21);
                    }
                });
            }
        });
    }
}
