// What the parts of the machine know of each other.
#pragma once

#include "machine.h"
#include "shared.h"

namespace emulation {

extern Shared shared;

namespace core {

int thread();   // that runs, of its block
int threads();  // of the block
Actor actor();

uint32_t time();                             // counted in meetings of threads
uint32_t tick();                             // what was done until now comes before what follows
void learn(int thread, const Clock& clock);  // the thread's warp knows what `clock` says
void wait(const char* name);                 // until somebody wakes the thread that runs
void wake(int thread);
uint32_t random();  // 0 where the schedule is in order

// The asynchronous part of a block (async.cpp).
void begin_block();
void end_block();  // nothing may be on its way any more
void begin_products();
void end_products();
bool land(bool nothing_else);  // lets one thing that is on its way arrive, if there is nothing else to do, or by chance

}  // namespace core
}  // namespace emulation
