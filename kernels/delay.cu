// Keeps the device busy for some time, so that what is launched behind it runs without
// gaps: the host has launched all of it by then.  One thread; nothing is read or written.

extern "C" __global__ void delay(const unsigned long long nanoseconds)
{
#ifdef HOST_SHIM
    (void)nanoseconds;
#else
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
#endif
}
